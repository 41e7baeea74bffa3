"""Expressions of one element, as eager PyTorch rounds and compares them.

TVM contracts ``a·b + c``, folds ``x == x`` and ``not x < y``, and compares NaN as unequal to nothing: what must not
happen to a value is said here.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.target.codegen import llvm_lookup_intrinsic_id

from .stages import COMPARE


def f32(value: float) -> Any:
    return tirx.const(value, "float32")


def _llvm(intrinsic: str, *args: Any) -> Any:
    return tirx.call_llvm_pure_intrin("float32", llvm_lookup_intrinsic_id(intrinsic), *args)


def rounded(x: Any) -> Any:
    """Keeps `x` (a product) rounded to float32 before it is used: no fused multiply-add."""
    return _llvm("llvm.arithmetic.fence", x)


def fma(x: Any, a: Any, b: Any) -> Any:
    """``x·a + b`` with one rounding."""
    return _llvm("llvm.fma", x, a, b)


def unless_nan(x: Any, value: Any) -> Any:
    """x itself where it is NaN, else `value`.

    TVM folds ``x == x``, so that one of the two hides behind a fence; its ``!=`` is false for NaN.
    """
    return tirx.Select(_llvm("llvm.arithmetic.fence", x) == x, value, x)


def relu_value(x: Any) -> Any:
    """NaN stays NaN and −0 stays −0, as in ATen's clamp_min."""
    return tirx.max(f32(0.0), x)


def clip_value(x: Any, low: float, high: float) -> Any:
    """ATen's clamp: NaN stays NaN; infinite bounds fall away.

    TVM's ``max(a, b)`` is ``a > b ? a : b``, so that the bound comes first. A Select would say the same, but x twice: a
    chain of them doubles with every link.
    """
    if low != -math.inf:
        x = tirx.max(f32(low), x)
    if high != math.inf:
        x = tirx.min(f32(high), x)
    return x


def prelu_value(x: Any, slope: Any) -> Any:
    """``x > 0 ? x : slope·x``, so that NaN stays NaN."""
    return tirx.Select(x > f32(0.0), x, rounded(slope * x))


def sign_value(x: Any, predicate: str) -> Any:
    """±1 (or −1, 0, +1) as a float, by the predicates of `pack`."""
    one, minus, zero = f32(1.0), f32(-1.0), f32(0.0)
    if predicate == "ternary":
        return tirx.Select(x > zero, one, tirx.Select(x < zero, minus, zero))
    compare, negated = COMPARE[predicate]
    return tirx.Select(compare(x), minus, one) if negated else tirx.Select(compare(x), one, minus)


def rounded_to(x: Any, form: str) -> Any:
    """x rounded to what a tensor core multiplies, as float32; NaN stays NaN.

    "tf32": to 10 bits behind the leading one, ties away from zero (PTX ISA, cvt.rna.tf32). "float16": as IEEE 754 has
    it, ties to even, to infinity from 65520 on.
    """
    bits = tirx.reinterpret("uint32", x)
    magnitude, infinite = bits & _u32(0x7FFFFFFF), _u32(0x7F800000)
    if form == "tf32":
        near = (bits + _u32(0x1000)) & _u32(0xFFFFE000)
    else:
        # Added to 2¹³ times its own power of two, or that of the least normal number, a float loses what is to go.
        power = tirx.Select(magnitude < _u32(113 << 23), _u32(113 << 23), magnitude & infinite)
        large = tirx.reinterpret("float32", power + _u32(13 << 23))
        near = tirx.reinterpret("uint32", rounded(rounded(tirx.reinterpret("float32", magnitude) + large) - large))
        near = tirx.Select(magnitude >= _u32(0x477FF000), infinite, near) | (bits & _u32(0x80000000))
    return tirx.reinterpret("float32", tirx.Select(magnitude > infinite, bits, near))


def _u32(value: int) -> Any:
    return tirx.const(value, "uint32")
