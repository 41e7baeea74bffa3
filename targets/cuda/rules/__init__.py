"""Schedule rules for GPUs, one family a file. A rule takes an unscheduled PrimFunc and returns one whose loops are
bound to threads, or the reason why it does not apply."""

from __future__ import annotations

from bnncc.targets.cuda.descriptor import CudaSpec

from .base import Rule
from .binary_mma import BinaryConv
from .byte_mma import ByteConv
from .nests import Elements, LoopNests
from .pack import Ballots
from .plane_mma import PlaneConv


def rules_for(target: CudaSpec) -> list[Rule]:
    """The rules of a target in the order they are tried: the more special first."""
    return [rule(target) for rule in (BinaryConv, PlaneConv, ByteConv, Ballots, Elements, LoopNests)]
