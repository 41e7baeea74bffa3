"""Packing by ballot: 32 lanes of a warp each look at one channel, and one instruction makes a word of what they saw.

    lane c of word w:   x[pixel, 32·w + c] >= 0    --ballot-->    word w of the pixel

A warp packs several words, whose loads are under way together, and its first lanes store them side by side. What the
channels' values are computed from happens in the same registers, and values that others read as well are stored on the
way. Images in NCHW are packed by threads beside each other on a row of pixels, 32 channels each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import ir, tirx
from tvm.tirx.script.builder import ir as T

from bnncc.targets.cuda.descriptor import WARP

from .base import THREADS, Rule
from .graph import Declined, Graph, Stage, loads, substitute
from .nests import REPEATS, Uses, merged_axes
from .registers import Kernel, build, is_choice

#: Words of a warp, as far as that leaves warps for every multiprocessor.
_WORDS, _BUSY = 8, 16
_ALL = tirx.const(0xFFFFFFFF, "uint32")


def predicate(block: Any) -> Callable[[Sequence[Any], Any], Any]:
    """Of a block "pack.bits": (indices of a byte, bit) → an int32 that is not 0 exactly where the bit is 1.

    It goes to a ballot as it is. Comparing it with 0 would let TVM turn ``not x < 0`` into ``0 <= x``, which NaN tells
    apart.
    """
    store = block.body
    names = [iv.var for iv in block.iter_vars]
    return _predicate(store.buffer, names, store.value)


def _predicate(buffer: Any, names: Sequence[Any], value: Any) -> Callable[[Sequence[Any], Any], Any]:
    terms = [e for e in (value.a, value.b) if not (isinstance(e, ir.TensorLoad) and e.source.same_as(buffer))]
    if not isinstance(value, tirx.Add) or len(terms) != 1:
        raise Declined(f"{buffer.name} is no sum of bits")
    return lambda indices, bit: substitute(terms[0], dict(zip(names, (*indices, bit), strict=True)))


class Ballots(Rule):
    """Everything that ends in packed bits, its channels in their order."""

    name = "ballots"

    def __call__(self, func: tirx.PrimFunc) -> tirx.PrimFunc | str:
        try:
            graph = Graph(func)
            packed = _packed(graph)
            if graph.repeats() > REPEATS:
                return "threads would compute the same values again and again"
            if packed.shape[-1] * 8 % WARP:
                raise Declined("the bytes of a pixel are not whole words")
            if graph.of("pack.words"):
                return self._planar(graph, packed)
            return self._ballots(graph, packed)
        except Declined as reason:
            return str(reason)

    def _ballots(self, graph: Graph, packed: Stage) -> tirx.PrimFunc:
        planes = packed.shape[3] if len(packed.shape) == 5 else 1
        pixels, words = packed.shape[:3], packed.shape[-1] * 8 // WARP
        total = math.prod(pixels) * words
        most = _WORDS if not any(s.reduced and s.role != "pack.bits" for s in graph.stages.values()) else 1
        divisors = [n for n in range(1, most + 1) if total % n == 0]
        each = max(n for n in divisors if n == 1 or total // n >= self.target.gpu.sms * _BUSY)
        warps = total // each
        threads = min(THREADS, warps * WARP)
        blocks = -(-warps * WARP // threads)
        runs = merged_axes(packed.shape[:3], [Uses(graph, packed)])
        sizes = [math.prod(pixels[axis] for axis in run) for run in runs]

        def body(kernel: Kernel, block: Any, thread: Any) -> None:
            lane = kernel.bind(tirx.floormod(thread, WARP), WARP)
            per_block = threads // WARP
            warp = kernel.bind(block * per_block + tirx.floordiv(thread, WARP), blocks * per_block)
            with kernel.when(warp < warps):
                kernel.also = {s.buffer: _stores(kernel, s) for s in graph.outputs if s is not packed}
                found = kernel.local("uint32", "words", each * planes)
                for word in range(each):
                    *row, w = kernel.split(warp * each + word, [*sizes, words])
                    pixel: list[Any] = [tirx.const(0, "int32")] * 3
                    for run, index in zip(runs, row, strict=True):
                        pixel[run[-1]] = index
                    channel = [w * (WARP // 8) + tirx.floordiv(lane, 8), tirx.floormod(lane, 8)]
                    for plane in range(planes):
                        at = [*pixel, *([plane] if len(packed.shape) == 5 else []), channel[0]]
                        bit = kernel.value(_bit(graph, packed.at(at), channel[1]))
                        vote = tirx.call_intrin("uint32", "tirx.cuda.ballot_sync", _ALL, bit)
                        T.buffer_store(found, vote, [word * planes + plane])
                out = kernel.view(packed.buffer, "uint32")
                for plane in range(planes):
                    mine = found[(each - 1) * planes + plane]
                    for word in reversed(range(each - 1)):
                        mine = tirx.Select(lane == word, found[word * planes + plane], mine)
                    place: Any = warp * each + lane
                    if planes > 1:
                        place = (tirx.floordiv(place, words) * planes + plane) * words + tirx.floormod(place, words)
                    with kernel.when(lane < each):
                        T.buffer_store(out, mine, [place])

        return build(graph, blocks, threads, body)

    def _planar(self, graph: Graph, packed: Stage) -> tirx.PrimFunc:
        if len(graph.outputs) != 1:
            raise Declined("values are stored beside the bits of an NCHW image")
        pixels, words = packed.shape[:3], math.prod(packed.shape[3:]) * 8 // WARP
        batch, area = pixels[0], pixels[1] * pixels[2]
        total = batch * words * area
        threads = min(THREADS, -(-total // WARP) * WARP)
        blocks = -(-total // threads)
        per_plane = packed.shape[-1] * 8 // WARP
        byte = tirx.Var("byte", "int32")

        def body(kernel: Kernel, block: Any, thread: Any) -> None:
            at = kernel.bind(block * threads + thread, blocks * threads)
            with kernel.when(at < total):
                n, word, y, x = kernel.split(at, [batch, words, *pixels[1:]])
                plane = [tirx.floordiv(word, per_plane)] if len(packed.shape) == 5 else []
                value = _word(graph, packed.at([n, y, x, *plane, byte]), byte, tirx.floormod(word, per_plane))
                out = kernel.view(packed.buffer, "uint32")
                row = (n * pixels[1] + y) * pixels[2] + x
                T.buffer_store(out, kernel.value(value), [row * words + word])

        return build(graph, blocks, threads, body)


def _packed(graph: Graph) -> Stage:
    """The result that holds the bits; all others are values on the way to it."""
    found = [s for s in graph.outputs if any(b.role in ("pack.bits", "pack.words") for b in graph.behind(s))]
    if len(found) != 1 or found[0].dtype != "uint8" or len(found[0].shape) not in (4, 5):
        raise Declined("not one result of packed bits")
    behind = [s.buffer for s in graph.behind(found[0])]
    if not all(s.buffer in behind for s in graph.outputs):
        raise Declined("a result that the bits do not come from")
    return found[0]


def _stores(kernel: Kernel, stage: Stage) -> Callable[[Sequence[Any], Any], None]:
    return lambda point, value: kernel.store(stage.buffer, point, value)


def _bit(graph: Graph, expr: Any, bit: Any) -> Any:
    """A bit of bytes that `expr` computes: an int32 that is not 0 where the bit is 1."""
    if isinstance(expr, ir.TensorLoad):
        stage = graph.stages.get(expr.source)
        if stage is not None and not stage.reduced:
            return _bit(graph, stage.at(expr.indices), bit)
    if isinstance(expr, tirx.Cast) and isinstance(expr.value, ir.TensorLoad):
        stage = graph.stages.get(expr.value.source)
        if stage is not None and stage.role == "pack.bits":
            names = [var for var, _ in (*stage.axes, *stage.reduced)]
            return _predicate(stage.buffer, names, stage.value)(expr.value.indices, bit)
    if is_choice(expr):
        condition, yes, no = expr.args
        return tirx.if_then_else(condition, _bit(graph, yes, bit), _bit(graph, no, bit))
    if any(load.source in graph.stages for load in loads(expr)):
        raise Declined("something is computed from packed bytes")
    return (tirx.Cast("int32", expr) >> bit) & 1


def _word(graph: Graph, expr: Any, byte: Any, word: Any) -> Any:
    """The word that four bytes make which `expr` computes as a function of `byte`."""
    if isinstance(expr, ir.TensorLoad):
        stage = graph.stages.get(expr.source)
        if stage is not None and not stage.reduced:
            return _word(graph, stage.at(expr.indices), byte, word)
    if is_choice(expr):
        condition, yes, no = expr.args
        return tirx.if_then_else(condition, _word(graph, yes, byte, word), _word(graph, no, byte, word))
    found = [load for load in loads(expr) if load.source in graph.stages]
    if found:
        (load,) = found
        if graph.stages[load.source].role != "pack.words":
            raise Declined("something is computed from packed bytes")
        return tirx.Cast("uint32", substitute(load, {byte: word * 4}))
    parts = [tirx.Cast("uint32", substitute(expr, {byte: word * 4 + i})) for i in range(4)]
    return parts[0] | (parts[1] << 8) | (parts[2] << 16) | (parts[3] << 24)
