"""The opt-ins to fewer bits: which float layers they take, and for int8 the ranges of their inputs.

The model is evaluated by torch, in Relax, on inputs that its user considers typical; the least and the greatest value
that each layer reads become its range. All of them, not a percentile: what clips is what the user did not show.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tvm import IRModule, relax

from bnncc.dialect import torch_eval
from bnncc.dialect.ops import is_call, op_name, shape_of
from bnncc.dialect.plan import QuantizedLayer
from bnncc.frontends.imported import Imported, Port
from bnncc.passes import pipeline
from bnncc.passes.fuse_binary_conv import FuseBinaryConv
from bnncc.passes.fuse_integer_conv import FuseIntegerConv
from bnncc.passes.grids import Grids
from bnncc.passes.lower_float import ROUNDED_CHANNELS
from bnncc.passes.quantize_float import QuantizeFloat
from bnncc.passes.rewriter import is_const, numpy_of, origins_of
from bnncc.runtime.errors import BnnccError, InputError
from bnncc.runtime.manifest import PortEntry
from bnncc.runtime.parity import cut_batches
from bnncc.targets.descriptor import TargetSpec
from bnncc.targets.intrinsics import DOTS

Calibration = Iterable[Any]

_LOG = logging.getLogger("bnncc")

# Fits what was measured with and without AVX-512, for windows and channels of all sizes.
_PACKING = 8

#: What rounds to infinity.
_FLOAT16_INFINITE = 65520

_LAYERS = ("nn.conv1d", "nn.conv2d", "nn.conv3d", "matmul")


def calibrate(
    imported: Imported, targets: Sequence[TargetSpec], calibration: Calibration, keep_float: Sequence[str] = ()
) -> tuple[QuantizedLayer, ...]:
    """The float layers of a model that are to compute with 8-bit integers, each with the range of its input: those that
    can, and that the fastest of the targets computes faster so.

    calibration: typical inputs, as `bnncc.validate` takes them, or one mapping of input names to arrays. keep_float:
        paths of modules whose layers stay float, those of their submodules included.
    Raises BnnccError for inputs that do not fit, for values that are not finite, and for a path without float layers.
    """
    mod = pipeline.canonicalize(imported.mod)
    layers = _float_layers(mod)
    _check_paths(keep_float, layers)
    calls, speed = _layers(mod), max(DOTS[target.dot].speed for target in targets)
    chosen = {
        var: path
        for var, path in layers.items()
        if not any(_within(path, kept) for kept in keep_float) and gains(calls[var], speed)
    }
    ranges = _ranges(mod, _batches(imported.inputs, calibration), chosen)
    quantized = [QuantizedLayer(var.name, path, *ranges[var]) for var, path in chosen.items()]
    left = {var.name for var in _float_layers(QuantizeFloat(quantized)(mod))}
    for layer in (layer for layer in quantized if layer.layer in left):
        _LOG.debug("calibrate: %s stays float: FuseIntegerConv declines it", layer.layer)
    return tuple(layer for layer in quantized if layer.layer not in left)


def gains(layer: relax.Call, speed: float) -> bool:
    """Whether a convolution or dense layer is faster on bytes. speed: products of bytes in the time of one of floats.

    The channels of a group fill words of four bytes, so that one channel costs as much as four; and every element of
    the input is packed, which costs as much as `_PACKING` products of floats and is shared by all that read it.
    """
    source, weight = layer.args
    outputs, inputs = (int(np.prod(shape_of(expr))) for expr in (layer, source))
    if is_call(layer, "matmul"):
        depth, window = shape_of(weight)[0], 1
    else:
        _, depth, *kernel = shape_of(weight)
        window = int(np.prod(kernel))
    padded = -(-depth // 4) * 4
    return outputs * window * (depth - padded / speed) > _PACKING * inputs


def rounded_layers(imported: Imported, form: str, keep_float: Sequence[str] = ()) -> tuple[QuantizedLayer, ...]:
    """The float layers of a model whose operands are to be rounded to "tf32" or "float16": those that tensor cores then
    multiply, which take vectors of input channels, and whose weights float16 can hold.

    Raises BnnccError for a path in `keep_float` without float layers.
    """
    mod = pipeline.canonicalize(imported.mod)
    layers, calls = _float_layers(mod), _layers(mod)
    _check_paths(keep_float, layers)
    chosen = []
    for var, path in layers.items():
        weight = numpy_of(calls[var].args[1])
        channels = weight.shape[0] if is_call(calls[var], "matmul") else weight.shape[1]
        fits = form != "float16" or bool((np.abs(weight) < _FLOAT16_INFINITE).all())
        kept = any(_within(path, module) for module in keep_float)
        if kept or channels % ROUNDED_CHANNELS[form] or not fits or not np.isfinite(weight).all():
            _LOG.debug("rounded_layers: %s stays float32", var.name)
            continue
        chosen.append(QuantizedLayer(var.name, path, None, None, form))
    return tuple(chosen)


class QuantizedReference:
    """A model some of whose layers are quantized, evaluated by torch: what an artifact with the opt-in is to compute.

    layers: as its manifest has them. Weights are quantized from the model's own. Raises BnnccError for another model.
    """

    def __init__(self, imported: Imported, layers: Sequence[QuantizedLayer]) -> None:
        mod = pipeline.canonicalize(imported.mod, layers)
        self._main = mod["main"]
        origins = origins_of(self._main)
        held = [*self._main.params, *(b.var for block in self._main.body.blocks for b in block.bindings)]
        self._variables = {origins[v.name].node: v for v in held if v.name in origins and origins[v.name].node}

    def outputs(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        tensors = [_tensor(array) for array in inputs]
        return [result.numpy() for result in torch_eval.evaluate_function(self._main, tensors)]

    def values(self, known: Mapping[str, np.ndarray], nodes: set[str]) -> dict[str, np.ndarray]:
        """The values of nodes of the model, given those of others."""
        wanted = {node: self._variables[node] for node in nodes}
        given = {self._variables[node]: _tensor(array) for node, array in known.items()}
        values = torch_eval.evaluate_from(self._main, given, list(wanted.values()))
        return {node: values[var].numpy() for node, var in wanted.items()}


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def _float_layers(mod: IRModule) -> dict[Any, str]:
    """The variables of layers with constant weights that no pass would take from floats, and their module paths."""
    names = {var.name for var in _layers(FuseIntegerConv(FuseBinaryConv(mod)))}
    origins = origins_of(mod["main"])
    return {var: origins[var.name].path for var in _layers(mod) if var.name in names}


def _layers(mod: IRModule) -> dict[Any, relax.Call]:
    bindings = (binding for block in mod["main"].body.blocks for binding in block.bindings)
    return {b.var: b.value for b in bindings if op_name(b.value) in _LAYERS and is_const(b.value.args[1])}


def _check_paths(paths: Sequence[str], layers: Mapping[Any, str]) -> None:
    for path in paths:
        if not any(_within(layer, path) for layer in layers.values()):
            known = sorted({layer for layer in layers.values() if layer})
            near = difflib.get_close_matches(path, known, n=3) or known[:3]
            raise BnnccError(
                f"keep_float names module {path!r}, which has no float layer; float layers are in "
                f"{', '.join(near) or 'no module'}"
            )


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _ranges(
    mod: IRModule, inputs: Iterable[tuple[np.ndarray, ...]], layers: Mapping[Any, str]
) -> dict[Any, tuple[float | None, float | None]]:
    """The range of each layer's input; (None, None) where the model quantizes that itself."""
    main = mod["main"]
    definition = {b.var: b.value for block in main.body.blocks for b in block.bindings}
    grids = Grids(definition)
    sources = {var: definition[var].args[0] for var in layers}
    measured = {var: source for var, source in sources.items() if grids.of(_unpadded(source, definition)) is None}
    low = dict.fromkeys(measured, np.inf)
    high = dict.fromkeys(measured, -np.inf)
    batches = list(inputs)
    if not batches:
        raise InputError("calibration: no inputs were given; give at least one sample")
    for batch in batches:
        known = dict(zip(main.params, map(_tensor, batch), strict=True))
        values = torch_eval.evaluate_from(main, known, list(measured.values()))
        for var, source in measured.items():
            least, greatest = map(float, values[source].aminmax())
            if not np.isfinite([least, greatest]).all():
                raise BnnccError(
                    f"a calibration input makes values that are not finite where module '{layers[var]}' reads them"
                )
            low[var], high[var] = min(low[var], least), max(high[var], greatest)
    return {var: (low[var], high[var]) if var in measured else (None, None) for var in layers}


def _unpadded(source: Any, definition: Mapping[Any, Any]) -> Any:
    value = definition.get(source)
    return value.args[0] if is_call(value, "nn.pad") else source


def _batches(ports: Sequence[Port], calibration: Calibration) -> Iterator[tuple[np.ndarray, ...]]:
    entries: list[PortEntry] = [
        {"name": port.name, "shape": list(port.shape), "dtype": port.dtype, "order": None} for port in ports
    ]
    if isinstance(calibration, Mapping):
        names = [port.name for port in ports]
        given = calibration
        if len(given) != len(names):
            raise InputError(
                f"calibration: {', '.join(given) or 'nothing'} was given; the inputs are {', '.join(names)}"
            )
        calibration = [tuple(given[name] for name in (names if set(names) == set(given) else given))]
    try:
        yield from cut_batches(entries, calibration)
    except InputError as error:
        raise InputError(f"calibration: {error}") from error
