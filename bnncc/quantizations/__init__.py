"""The functions that quantize weights and activations, with the gradients to train through them.

Names, arguments and values are bitorch's (https://github.com/hpi-xnor/bitorch), so that a model moves over by changing
its imports. A quantization is a module, without state but for `Pact`: it copies, pickles and exports to plain ATen
operators. To add one: subclass `Quantization` and hand the class to `register_custom_quantization`.
"""

from __future__ import annotations

from bnncc.quantizations.approx_sign import ApproxSign
from bnncc.quantizations.base import STE, ArgumentError, Quantization
from bnncc.quantizations.dorefa import InputDoReFa, WeightDoReFa
from bnncc.quantizations.identity import Identity
from bnncc.quantizations.pact import Pact
from bnncc.quantizations.progressive_sign import ProgressiveSign
from bnncc.quantizations.sign import Sign, binarize
from bnncc.quantizations.ste_heaviside import SteHeaviside
from bnncc.quantizations.swish_sign import SwishSign

__all__ = [
    "STE",
    "ApproxSign",
    "ArgumentError",
    "Identity",
    "InputDoReFa",
    "Pact",
    "ProgressiveSign",
    "Quantization",
    "Sign",
    "SteHeaviside",
    "SwishSign",
    "WeightDoReFa",
    "as_quantization",
    "binarize",
    "quantization_from_name",
    "quantization_names",
    "quantizations_by_name",
    "register_custom_quantization",
]

quantizations_by_name: dict[str, type[Quantization]] = {
    quantization.name: quantization
    for quantization in (
        ApproxSign,
        InputDoReFa,
        WeightDoReFa,
        Identity,
        Pact,
        ProgressiveSign,
        Sign,
        SteHeaviside,
        SwishSign,
    )
}


def quantization_from_name(name: str) -> type[Quantization]:
    """The class of that name; underscores do not matter (`approx_sign` is `approxsign`).

    Raises ArgumentError, which is also a ValueError, listing the names there are.
    """
    for known, quantization in quantizations_by_name.items():
        if known.replace("_", "") == name.replace("_", ""):
            return quantization
    raise ArgumentError(f"no quantization is called {name!r}; there are {', '.join(quantization_names())}")


def quantization_names() -> list[str]:
    return sorted(quantizations_by_name)


def register_custom_quantization(custom_quantization: type[Quantization]) -> None:
    """Lets layers find a class by its `name`; a class of the same name is replaced."""
    quantizations_by_name[custom_quantization.name] = custom_quantization


def as_quantization(quantization: str | Quantization) -> Quantization:
    """A module from what a layer's argument may be: a name or a module. Raises ArgumentError."""
    if isinstance(quantization, Quantization):
        return quantization
    if isinstance(quantization, str):
        return quantization_from_name(quantization)()
    raise ArgumentError(f"a quantization is a name or a Quantization module, not {type(quantization).__name__}")
