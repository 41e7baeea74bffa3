"""Packing without horizontal operations.

Channel ``block·8L + v·L + l`` is bit v of byte ``block·L + l``, so eight vectors of comparisons become one vector of
bytes: ``acc[l] |= x[v·L + l] >= t ? 1 << v : 0`` over v, then one narrowing store. Where comparisons give masks of bits
(AVX-512) L is 1, so that channels lie in their order, and a comparison of 16 values and a store of its mask is all.
"""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV

from bnncc.dialect.stages import LANES, UNEVEN
from bnncc.targets.descriptor import MASK_LANES, TargetSpec
from bnncc.targets.intrinsics import use_mask

from .base import Stages, extent, iterations, parallel_outer, partition, unroll


def block_lanes(sch: Schedule, bits: SBlockRV) -> int:
    """Bytes of one block of the layout that a "pack.bits" stage packs to."""
    return int(sch.get(bits).annotations[LANES])


def in_order(sch: Schedule, bits: SBlockRV, target: TargetSpec) -> bool:
    """Whether a "pack.bits" stage packs channels in their order, on a target that has masks for that."""
    return target.masks and block_lanes(sch, bits) == 1


def schedule_bits(sch: Schedule, bits: SBlockRV, pack: SBlockRV) -> None:
    """Computes the bits of one block of bytes at a time, in registers, in the innermost loop of `pack`."""
    lanes = block_lanes(sch, bits)
    byte = sch.get_loops(pack)[-1]
    block, lane = sch.split(byte, [None, lanes])
    if int(sch.get(bits).annotations[UNEVEN]):
        # Of the vectors of the last block only one holds channels and padding, and only that one goes lane by lane.
        partition(sch, block)
    sch.vectorize(lane)
    sch.compute_at(bits, block, preserve_unit_loops=True)
    *_, lane, v = sch.get_loops(bits)
    sch.reorder(v, lane)
    sch.vectorize(lane)
    sch.unroll(v)
    init = sch.decompose_reduction(bits, v)
    sch.vectorize(sch.get_loops(init)[-1])
    sch.set_scope(bits, 0, "local")


class Masks:
    """The same where a comparison of `lanes` values, 8 or 16, gives a mask of as many bits: the packed channels.

    blocks: the bits of one such mask as one block. Where it goes is scheduled in between; `finish` comes last, because
    TVM forgets then who reads the block.
    """

    def __init__(self, sch: Schedule, bits: SBlockRV, lanes: int = MASK_LANES) -> None:
        *_, byte, v = sch.get_loops(bits)
        self.sch, self.bits, self.bytes = sch, bits, lanes // 8 if extent(sch, byte) % 2 == 0 else 1
        _, within = sch.split(byte, [None, self.bytes])
        self.blocks = sch.blockize(sch.fuse(within, v))
        sch.set_scope(self.blocks, 0, "local")

    def place(self, pack: SBlockRV) -> None:
        """Computes the blocks in the innermost loop of `pack`."""
        block, lane = self.sch.split(self.sch.get_loops(pack)[-1], [None, self.bytes])
        self.sch.vectorize(lane)
        self.sch.compute_at(self.blocks, block, preserve_unit_loops=True)

    def finish(self) -> None:
        use_mask(self.sch, self.bits, self.blocks)


def schedule_pack(stages: Stages, bits: SBlockRV, target: TargetSpec, *, joined: bool = False) -> set[str]:
    """Schedules one packing whose input lies in memory, with its padding; returns the names of the stages it took.

    joined: its input is a concatenation, so that the loop over blocks of bytes is divided where the tensors meet.
    """
    sch = stages.sch
    last, names = _with_padding(stages, bits)
    work = iterations(sch, bits) / target.float_lanes
    masks = Masks(sch, bits) if in_order(sch, bits, target) else None
    if masks and stages.role(last) == "pad":
        # With a condition at every pixel, LLVM may take each mask by way of the stack, and wait for it there.
        partition(sch, sch.get_loops(last)[2])
    parallel_outer(sch, sch.get_loops(last)[:2], work)
    if len(sch.get(last).iter_vars) == 5:  # ternary: [N, H, W, 2, bytes]
        unroll(sch, sch.get_loops(last)[-2])
    if masks:
        masks.place(last)
    else:
        schedule_bits(sch, bits, last)
    if joined:
        # Not unrolled with masks: LLVM gathers those of straight-line code in vectors, by way of the stack.
        (partition if masks else unroll)(sch, sch.get_loops(last)[-2])
    if masks:
        masks.finish()
    return names


def schedule_planar(stages: Stages, words: SBlockRV, target: TargetSpec) -> set[str]:
    """Schedules a packing of an NCHW image: pixels in the lanes, then four bytes a store; returns the stages' names."""
    sch = stages.sch
    last, names = _with_padding(stages, words)
    n, word, tile, lane, r = sch.get_loops(words)
    tile = parallel_outer(sch, [n, word, tile], iterations(sch, words) / target.float_lanes)
    sch.reorder(r, lane)
    sch.vectorize(lane)
    local = sch.cache_write(words, 0, "local")
    sch.reverse_compute_at(local, tile, preserve_unit_loops=True)
    sch.vectorize(sch.get_loops(local)[-1])
    sch.unroll(r)
    init = sch.decompose_reduction(words, r)
    sch.vectorize(sch.get_loops(init)[-1])
    # LLVM merges the stores of four bytes of one integer.
    _, part = sch.split(sch.get_loops(last)[-1], [None, 4])
    sch.unroll(part)
    parallel_outer(sch, sch.get_loops(last)[:2], iterations(sch, last) / 4)
    return names


def _with_padding(stages: Stages, bits: SBlockRV) -> tuple[SBlockRV, set[str]]:
    """The stage that writes the bytes of `bits`: what pads them where that follows; and the names of the stages."""
    (pack,) = stages.consumers(bits)
    names = {stages.name(b) for b in (bits, pack)}
    after = stages.consumers(pack)
    if len(after) != 1 or stages.role(after[0]) != "pad" or stages.is_output(pack):
        return pack, names
    names.add(stages.name(after[0]))
    stages.sch.compute_inline(pack)
    stages.blocks.remove(pack)
    return after[0], names
