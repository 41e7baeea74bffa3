"""The compiler, as a list: from Relax in the user's own terms to a plan of kernel calls.

Each phase below is a list of passes; the reason for an order stands beside it, the rest of a pass's contract in its
file. `dump` receives the module after every pass (`bnncc compile --dump-ir DIR` writes the files).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.ir import IRModule

from bnncc.dialect.plan import QuantizedLayer
from bnncc.passes.canonicalize_sign import CanonicalizeSign
from bnncc.passes.fold_constants import FoldConstants
from bnncc.passes.form_kernels import STEPS, FormKernels
from bnncc.passes.fuse_binary_conv import FuseBinaryConv
from bnncc.passes.fuse_integer_conv import FuseIntegerConv
from bnncc.passes.fuse_threshold import FuseThreshold
from bnncc.passes.hoist_reshape import HoistReshape
from bnncc.passes.lower_batch_norm import LowerBatchNorm
from bnncc.passes.lower_float import LowerFloat
from bnncc.passes.mark_quantized import MarkQuantized
from bnncc.passes.own_outputs import OwnOutputs
from bnncc.passes.pack_bits import PackBits
from bnncc.passes.pack_bytes import PackBytes
from bnncc.passes.pack_planes import PackPlanes
from bnncc.passes.plan_memory import plan_memory
from bnncc.passes.quantize_float import QuantizeFloat
from bnncc.passes.rewriter import LAYERS, OPT_INS, ORIGINS, origins_of
from bnncc.passes.sink_scale import SinkScale
from bnncc.passes.to_nhwc import ToNHWC

Dump = Callable[[str, IRModule], None]


_CANONICALIZE = [
    CanonicalizeSign,  # first: a straight-through weight folded as written would not be ±1
    FoldConstants,
    MarkQuantized,  # scales are numbers by now
    SinkScale,  # a scaled sign is a sign and a scaled weight
    HoistReshape,  # a sign stands right before the layer it quantizes for
]


def phases(
    target: Any, channels_last: str = "none", quantized: Sequence[QuantizedLayer] = ()
) -> list[tuple[str, list[Any]]]:
    """The passes for a target, phase by phase, in order.

    channels_last: as in `ToNHWC`. quantized: the float layers that are to become integer ones.
    """
    return [
        (
            "canonicalize: one spelling of everything",
            [
                *_CANONICALIZE,
                *([QuantizeFloat(quantized)] if quantized else []),  # names are final; nothing is fused yet
            ],
        ),
        (
            "fuse: what the model means, in binary operators and the model's own layout",
            [
                FuseBinaryConv,  # weights are constants by now
                FuseIntegerConv,  # what is not binary but has few bits
                FuseThreshold,  # evaluates whole batch norms, so before they are lowered
                LowerBatchNorm,
            ],
        ),
        (
            "lower: the target's layouts",
            [
                ToNHWC(channels_last, target.planar_windows),
                PackBits(target),  # reads NHWC
                PackPlanes(target),
                PackBytes(target),  # integers of more bits than planes are good for
                LowerFloat(target),
            ],
        ),
        (
            "form kernels: what is computed in one pass over memory",
            [
                FoldConstants,  # reshapes of weights that the lowering left
                OwnOutputs,
                FormKernels(target),
            ],
        ),
    ]


def canonicalize(mod: IRModule, quantized: Sequence[QuantizedLayer] = ()) -> IRModule:
    """The first phase alone, whose result torch can still evaluate (`bnncc.dialect.torch_eval`)."""
    for step in [*_CANONICALIZE, *([QuantizeFloat(quantized)] if quantized else [])]:
        mod = step(mod)
    return mod


def run(
    mod: IRModule,
    target: Any,
    dump: Dump | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    channels_last: str = "none",
    quantized: Sequence[QuantizedLayer] = (),
) -> IRModule:
    """Every pass in order: a module whose `main` is a straight line of kernel calls, and the unscheduled kernels."""
    passes = [p for _, phase in phases(target, channels_last, quantized) for p in phase]
    if dump:
        dump("imported", mod)
    for index, step in enumerate(passes):
        name = step.info.name
        if progress:
            progress(name, index, len(passes))
        mod = step(mod)
        if dump:
            dump(name, mod)
    return mod


def readable(mod: IRModule) -> str:
    """The module as TVMScript, the module path of the user's model behind each line instead of in a table."""
    main = mod["main"]
    paths = {name: origin.path for name, origin in origins_of(main).items()}
    bare = mod.clone()
    for attribute in (ORIGINS, LAYERS, OPT_INS, STEPS):
        main = main.without_attr(attribute)
    bare["main"] = main
    lines = []
    for line in bare.script(show_meta=False).splitlines():
        path = paths.get(line.strip().split(":")[0].split(" =")[0])
        lines.append(f"{line}  # {path}" if path else line)
    return "\n".join(lines) + "\n"


__all__ = ["phases", "plan_memory", "readable", "run"]
