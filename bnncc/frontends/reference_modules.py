"""torch.ao modules that torch.export cannot trace, as modules that it can: on a copy, the user's model stays as it is.

* The reference modules (`torch.ao.nn.quantized.reference`) quantize and dequantize their weight in every forward. The
  weight is a constant, so its value is computed once, by `get_weight()` itself, and is bit-equal by construction.
* `FakeQuantize` modules decide by their buffers what they do. With the observer off that is one call of
  `torch.fake_quantize_*`, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.ao.nn.quantized.reference.modules.utils import ReferenceQuantizedModule
from torch.ao.quantization import FakeQuantize, FakeQuantizeBase

from bnncc.runtime.errors import BnnccError


class ReferenceModuleError(BnnccError):
    """A torch.ao module that has no fixed meaning yet, or whose own parameters are refused by PyTorch."""


def traceable(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, or, where it has modules of these kinds, a copy that shares all tensors with it.

    Raises:
        ReferenceModuleError: a FakeQuantize that still observes; weight parameters that PyTorch refuses.
    """
    replaced: dict[int, dict[str, Callable[..., torch.Tensor]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ReferenceQuantizedModule) and hasattr(module, "weight"):
            replaced[id(module)] = {"get_weight": _constant(_weight(path, module))}
        elif isinstance(module, FakeQuantizeBase):
            replaced[id(module)] = {"forward": _fake_quantize(path, module)}
    return _copy(model, replaced, {}) if replaced else model


def _copy(
    module: torch.nn.Module, replaced: dict[int, dict[str, Any]], copies: dict[int, torch.nn.Module]
) -> torch.nn.Module:
    """The tree of modules again, with the same parameters and buffers; a module used twice is one module again."""
    if id(module) not in copies:
        # Not through the constructor, nor copy.copy: a GraphModule's would compile its code again.
        twin: torch.nn.Module = object.__new__(type(module))
        copies[id(module)] = twin
        twin.__dict__.update(module.__dict__)
        children = module._modules.items()
        twin.__dict__["_modules"] = {
            name: None if child is None else _copy(child, replaced, copies) for name, child in children
        }
        twin.__dict__.update(replaced.get(id(module), {}))
    return copies[id(module)]


def _constant(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: value


def _weight(path: str, module: Any) -> torch.Tensor:
    try:
        with torch.no_grad():
            return module.get_weight().detach().clone()
    except Exception as error:
        raise ReferenceModuleError(
            f"PyTorch refuses the weight of module '{path}' ({module._get_name()}): {error}; check its weight_qparams"
        ) from error


def _fake_quantize(path: str, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    if not isinstance(module, FakeQuantize):
        raise ReferenceModuleError(
            f"module '{path}' is a {type(module).__name__}: only torch.ao.quantization.FakeQuantize and its subclasses "
            "have a fixed meaning; replace it, or convert the model first"
        )
    if bool(module.observer_enabled.any()):
        raise ReferenceModuleError(
            f"module '{path}' still observes its input: call model.apply(torch.ao.quantization.disable_observer)"
        )
    if not bool(module.fake_quant_enabled.any()):
        return lambda x: x
    low, high = int(module.activation_post_process.quant_min), int(module.activation_post_process.quant_max)
    if module.is_per_channel:
        scales, zero_points, axis = module.scale.detach().clone(), module.zero_point.detach().clone(), module.ch_axis
        return lambda x: torch.fake_quantize_per_channel_affine(x, scales, zero_points, axis, low, high)
    scale, zero_point = float(module.scale), int(module.zero_point)
    return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
