"""Convolutions of bit planes on tensor cores: popcounts of each pair of planes, weighted by shifts.

    plane_counts[…, pair] = Σ pc(a_i op w_j)   →   plane_conv2d[…] = Σ ±2^(i+j) · plane_counts[…, pair]

are one product (`BinaryMma`): all planes of a tile are loaded once, and pairs of the same weight share their sums.
"""

from __future__ import annotations

from typing import ClassVar

from bnncc.dialect.stages import FORM

from .bilinear import of_planes
from .binary_mma import product_of_bits
from .gemm import Gemm, ImplicitGemm, Product


class PlaneConv(ImplicitGemm):
    """Bitserial convolutions and dense layers."""

    name = "convolution of bit planes on tensor cores"
    anchor_role: ClassVar[str] = "binary_conv2d.chunk"
    total_role: ClassVar[str] = "binary_conv2d.total"

    def product(self, gemm: Gemm) -> Product | str:
        if str(gemm.x.dtype) != "uint32" or gemm.lanes != 1:
            return "its operands do not lie as tensor cores take them"
        return product_of_bits(gemm, self.target.gpu, of_planes(*gemm.planes, str(gemm.annotations[FORM])))
