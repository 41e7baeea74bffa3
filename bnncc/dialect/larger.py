"""The larger of two floats where NaN wins: one operator of TIR, which processors compute in different ways.

Of equal values (0 and −0) the first stays, as in ATen's max pooling.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Op, register_op_attr
from tvm.target import Target
from tvm.target.codegen import llvm_lookup_intrinsic_id

_NAME = "tirx.bnncc_larger"


def larger(kept: Any, new: Any) -> Any:
    """`new` where it is larger or NaN, else `kept`; NaN if either is. Of floats or vectors of them."""
    return tirx.call_intrin(str(kept.ty.dtype), _NAME, kept, new)


def _llvm(intrinsic: str, *args: Any) -> Any:
    return tirx.call_llvm_pure_intrin(str(args[0].ty.dtype), llvm_lookup_intrinsic_id(intrinsic), *args)


def _lowered(call: Any) -> Any:
    kept, new = call.args
    target = Target.current(allow_none=True)
    if target is not None and "aarch64" in str(target.attrs.get("mtriple", "")):
        # FMAX keeps NaN, and would make 0 of −0 and 0; for equal values it is not asked.
        return tirx.Select(new <= kept, kept, _llvm("llvm.maximum", kept, new))
    # TVM folds ``new == new``, so that one of the two hides behind a fence.
    # x86's MAXPS keeps the second of two that compare as neither: one instruction, and two for a NaN that is new.
    return tirx.Select(_llvm("llvm.arithmetic.fence", new) == new, tirx.Select(new > kept, new, kept), new)


def _register() -> None:
    import tvm.script.parser.tirx as parser
    import tvm.script.tirx as script

    for key, value in (
        ("TCallEffectKind", Op.get("tirx.exp").get_attr("TCallEffectKind")),
        ("TVectorizable", True),
        ("TScriptPrinterName", "bnncc_larger"),
        ("default.FLowerIntrinsic", _lowered),
    ):
        register_op_attr(_NAME, key, value)
    script.bnncc_larger = parser.bnncc_larger = larger  # type: ignore[attr-defined]


_register()
