"""Schedule rules, one family a file. A rule takes an unscheduled PrimFunc and returns a Schedule, or the reason why it
does not apply."""

from __future__ import annotations

from bnncc.targets.descriptor import TargetSpec

from .base import Rule
from .binary_conv import BinaryConv, BinaryConvBytes, BinaryConvWordBytes
from .byte_conv import ByteConv
from .conv import Conv, Dense
from .lane_conv import LaneConv
from .nests import LoopNests
from .permute import Permute
from .permute_pad import PermutePad
from .planar import Planar
from .register_tile import TiledAnchor
from .run_sums import RunSums
from .softmax import Softmax
from .tiles import Tiles, default_tile

_TILED: tuple[type[TiledAnchor], ...] = (
    BinaryConv, LaneConv, BinaryConvBytes, BinaryConvWordBytes, ByteConv, Conv, Dense,
)  # fmt: skip


def rules_for(target: TargetSpec, tiles: Tiles = default_tile) -> list[Rule]:
    """The rules of a target in the order they are tried: the more special first. tiles: chooses their tiles."""
    return [
        *(rule(target, tiles) for rule in _TILED),
        *(rule(target) for rule in (Permute, PermutePad, Softmax, Planar, RunSums, LoopNests)),
    ]
