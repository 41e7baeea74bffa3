"""What follows the sums of a tile: each warp takes rows, each lane a channel.

    s = sums[row, channel]  →  z = scale·s + residual …  →  store z
                                                         →  ballot(z ≥ 0)  →  one word of packed channels

A ballot of a warp is a word because `CudaSpec.bit_layout` leaves channels in their own order. Floats are read and
written by neighbouring lanes side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Var
from tvm.ir.expr import TensorLoad
from tvm.script.ir_builder import tirx as T

from bnncc.dialect.stages import IN_ORDER
from bnncc.targets.cuda.descriptor import WARP
from bnncc.targets.rules.base import Stages

from .base import IF_THEN_ELSE, guarded

if TYPE_CHECKING:
    from .gemm import Gemm, Tile

_ALL_LANES = 0xFFFFFFFF


def bit_of(expr: Any) -> Any | None:
    """1 where a term of "pack.bits" sets its bit, else 0, as int32; None for terms of more than one condition.

    The arms are exchanged, not the condition: TVM turns ``not x < 0`` into ``0 <= x``, which NaN tells apart.
    """
    if isinstance(expr, tirx.Select):
        arms = [bit_of(expr.true_value), bit_of(expr.false_value)]
        return None if any(arm is None for arm in arms) else tirx.Select(expr.condition, *arms)
    if isinstance(expr, tirx.IntImm):
        return tirx.const(int(int(expr.value) != 0), "int32")
    if isinstance(expr, Call) and expr.op.same_as(IF_THEN_ELSE):
        arms = [bit_of(arm) for arm in expr.args[1:]]
        return None if any(arm is None for arm in arms) else tirx.if_then_else(expr.args[0], *arms)
    return tirx.const(1, "int32") if isinstance(expr, tirx.LShift) else None


@dataclass(frozen=True)
class _Stage:
    """A stage of the epilogue: what it stores for its axes."""

    buffer: Any
    axes: tuple[Any, ...]
    value: Any


def _stage(block: Any) -> _Stage:
    return _Stage(block.body.buffer, tuple(iv.var for iv in block.iter_vars), block.body.value)


class Epilogue:
    """The stages of a fused function behind its anchor. values: elementwise results. packs: (bits, packed bytes)."""

    def __init__(self, gemm: Gemm, channels: int, values: list[_Stage], packs: list[tuple[_Stage, Any]]) -> None:
        self.gemm, self.channels, self.values, self.packs = gemm, channels, values, packs
        self.group_channels = channels // gemm.groups
        self.alone = not values and not packs  # the sums themselves are the result

    @classmethod
    def of(cls, stages: Stages, anchor: Any, gemm: Gemm) -> Epilogue | str:
        """The epilogue, or what in it a tile cannot compute. stages: inlined but for outputs and packs."""
        values: list[_Stage] = []
        packs: list[tuple[_Stage, Any]] = []
        bits: dict[Any, _Stage] = {}
        for block in stages.blocks[1:]:
            role, stage = stages.role(block), _stage(stages.sch.get(block))
            if role == "pack.bits":
                own, term = stage.value.a, bit_of(stage.value.b)
                if term is None or not own.source.same_as(stage.buffer):
                    return "its packing is not one of single bits"
                if not int(stages.sch.get(block).annotations[IN_ORDER]):
                    return "its packed channels are not in order"
                bits[stage.buffer] = _Stage(stage.buffer, stage.axes, term)
            elif role == "pack" and stage.value.value.source in bits:
                packs.append((bits[stage.value.value.source], stage.buffer))
            elif role == "":
                values.append(stage)
            else:
                return f"a stage {role}"
        results = [stage.buffer for stage in values]
        if any(int(buffer.shape[-1]) != gemm.channels for buffer in results):
            return "its results are not rows of channels"
        epilogue = cls(gemm, gemm.channels, values, packs)
        return epilogue if epilogue._fits() else "its results are not rows of channels"

    def _fits(self) -> bool:
        gemm, words = self.gemm, -(-self.channels // WARP)
        if not self.channels or self.channels % gemm.groups:
            return False
        whole = gemm.groups == 1 or self.group_channels % WARP == 0
        for stage in self.values:
            rows = [int(extent) for extent in stage.buffer.shape[:-1]]
            if rows not in ([gemm.images, gemm.height, gemm.width], [gemm.rows]):
                return False
        for bits, packed in self.packs:
            shape = [int(extent) for extent in packed.shape]
            if not whole or shape != [gemm.images, gemm.height, gemm.width, 4 * words] or len(bits.axes) != 5:
                return False
        return True

    def run(self, sums: Callable[[Any, Any], Any], tile: Tile, thread: Any, row: Any, column: Any, group: Any) -> None:
        """Writes the loops over a tile's sums; row, column, group: where it lies."""
        warps, lane = tile.threads // WARP, tirx.floormod(thread, WARP)
        with T.serial(0, -(-tile.rows // warps)) as step:
            r = T.bind(step * warps + tirx.floordiv(thread, WARP))
            at = T.bind(row + r)
            with (
                guarded(r < tile.rows, tile.rows % warps != 0),
                guarded(at < self.gemm.rows, self.gemm.rows % tile.rows != 0),
            ):
                self._row(sums, tile, lane, r, at, column, group)

    def _row(
        self, sums: Callable[[Any, Any], Any], tile: Tile, lane: Any, r: Any, at: Any, column: Any, group: Any
    ) -> None:
        ragged = self.group_channels % tile.columns != 0
        pixel = self.gemm.pixel(at)
        words: list[list[Any]] = [[] for _ in self.packs]
        for first in range(0, tile.columns, WARP):
            within = column + first + lane
            # Lanes beyond the last channel compute that of the last one again, and store nothing.
            inside = within < self.group_channels if self.group_channels % WARP or ragged else None
            safe = within if inside is None else tirx.min(within, self.group_channels - 1)
            channel = T.bind(group * self.group_channels + safe)
            known: dict[Any, Any] = {self.gemm.sums: T.bind(sums(r, first + lane))}
            if self.alone:
                with guarded(inside, inside is not None):
                    T.buffer_store(self.gemm.sums, known[self.gemm.sums], self._place(pixel, at, group, within))
            for stage in self.values:
                index = (*pixel, channel) if len(stage.axes) == 4 else (at, channel)
                value = T.bind(_evaluated(stage.value, dict(zip(stage.axes, index, strict=True)), known))
                known[stage.buffer] = value
                with guarded(inside, inside is not None):
                    T.buffer_store(stage.buffer, value, list(index))
            for number, (bits, _) in enumerate(self.packs):
                # Where channels fill no whole word, the predicate knows which bits are padding.
                place = group * self.group_channels + (within if self.group_channels % WARP else safe)
                bit_index = (*pixel, tirx.floordiv(place, 8), tirx.floormod(place, 8))
                bit = _evaluated(bits.value, dict(zip(bits.axes, bit_index, strict=True)), known)
                words[number].append(T.bind(T.cuda.ballot_sync(tirx.const(_ALL_LANES, "uint32"), bit)))
        for (_, packed), ballots in zip(self.packs, words, strict=True):
            self._store_words(packed, ballots, lane, pixel, column, group, ragged)

    def _place(self, pixel: Any, row: Any, group: Any, column: Any) -> list[Any]:
        """Where the anchor's own buffer has a sum."""
        block = tirx.floordiv(column, self.gemm.lanes), tirx.floormod(column, self.gemm.lanes)
        return [row, *block] if len(self.gemm.sums.shape) == 3 else [*pixel, group, *block]

    def _store_words(
        self, packed: Any, ballots: list[Any], lane: Any, pixel: Any, column: Any, group: Any, ragged: bool
    ) -> None:
        """The words of a row of the tile, one from each of the first lanes."""
        word = ballots[-1]
        for number in range(len(ballots) - 2, -1, -1):
            word = tirx.Select(lane == number, ballots[number], word)
        condition = lane < len(ballots)
        if ragged:
            condition = tirx.all(condition, column + lane * WARP < self.group_channels)
        with T.If(condition), T.Then():
            place = tirx.floordiv(group * self.group_channels + column, WARP) + lane
            T.buffer_store(packed, tirx.reinterpret("uint8x4", word), [*pixel, tirx.Ramp(place * 4, 1, 4)])


def _evaluated(value: Any, axes: dict[Any, Any], known: dict[Any, Any]) -> Any:
    """An expression at these values of its axes, where the elements of some buffers are known."""

    def element(load: Any) -> Any:
        return known.get(load.source, load)

    return tvm_ffi.structural_map(value, [(TensorLoad, element), (Var, lambda var: axes.get(var, var))])
