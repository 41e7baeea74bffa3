"""Schedule rules for GPUs, one family a file. A rule takes an unscheduled PrimFunc and returns one whose loops are
bound to threads, or the reason why it does not apply."""

from __future__ import annotations

from bnncc.targets.cuda.descriptor import CudaSpec

from .base import Rule
from .binary_mma import BinaryConv
from .byte_mma import ByteConv
from .float_conv import FloatConv, FloatDense
from .float_mma import RoundedConv, RoundedDense
from .nests import Elements, LoopNests
from .pack import Ballots
from .permute import Permute
from .plane_mma import PlaneConv
from .reduction import Means
from .softmax import Softmax


def rules_for(target: CudaSpec) -> list[Rule]:
    """The rules of a target in the order they are tried: the more special first."""
    families = (
        *(BinaryConv, PlaneConv, ByteConv, RoundedConv, RoundedDense, FloatConv, FloatDense),
        *(Softmax, Permute, Means, Ballots, Elements, LoopNests),
    )
    return [rule(target) for rule in families]
