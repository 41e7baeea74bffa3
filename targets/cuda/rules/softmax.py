"""Softmax: a row is a warp's, or a block's if it is long; its values stay in registers from the first step to the last.

Sums and maxima of the lanes meet by shuffles, those of the warps in shared memory. The steps' expressions are those of
`bnncc.dialect.computes_pool.softmax`; the order of the sum is another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from bnncc.targets.cuda.descriptor import WARP

from .base import Rule, barrier
from .graph import Declined, Graph, Stage
from .registers import Kernel, build, everywhere

#: Values of a row that a thread holds, and threads of a block.
_MOST, _THREADS = 16, 256


def fold_lanes(kernel: Kernel, local: Any, fold: Callable[[Any, Any], Any]) -> None:
    """Every lane of the warp gets the fold of `local[0]` over all of them."""
    step = WARP // 2
    while step:
        other = kernel.local(str(local.dtype), "other", 1)
        shuffled = tirx.call_extern(
            str(local.dtype), "__shfl_xor_sync", tirx.const(0xFFFFFFFF, "uint32"), local[0], step
        )
        T.buffer_store(other, shuffled, [0])
        T.buffer_store(local, fold(local[0], other[0]), [0])
        step //= 2


def accumulate(local: Any, values: Sequence[Any], fold: Callable[[Any, Any], Any]) -> None:
    """Folds values into a register one by one: CUDA C says either side of a maximum twice."""
    T.buffer_store(local, values[0], [0])
    for value in values[1:]:
        T.buffer_store(local, fold(local[0], value), [0])


class Softmax(Rule):
    """Softmax over the rows of a matrix, with the elementwise stages around it."""

    name = "softmax"

    def __call__(self, func: tirx.PrimFunc) -> tirx.PrimFunc | str:
        try:
            graph = Graph(func)
            steps = {name: self._step(graph, name) for name in ("row", "max_1", "exp", "sum_1", "scale")}
            if any(len(s.shape) != 2 for s in graph.outputs) or len({s.shape for s in graph.outputs}) != 1:
                raise Declined("not a softmax alone")
            return self._written(graph, steps)
        except Declined as reason:
            return str(reason)

    def _step(self, graph: Graph, name: str) -> Stage:
        found = graph.of(f"softmax.{name}")
        if len(found) != 1:
            raise Declined("no softmax")
        return found[0]

    def _written(self, graph: Graph, steps: dict[str, Stage]) -> tirx.PrimFunc:
        rows, size = graph.outputs[0].shape
        warps = 1  # of a row
        while -(-size // (warps * WARP)) > _MOST:
            warps *= 2
        if warps * WARP > 4 * _THREADS:
            raise Declined(f"rows of {size} do not fit into the registers of a block")
        together = max(1, _THREADS // 2 // (warps * WARP)) if rows >= self.target.gpu.sms else 1  # rows of a block
        threads, each = together * warps * WARP, -(-size // (warps * WARP))
        row, top, exp, total, scale = steps.values()

        def body(kernel: Kernel, block: Any, thread: Any) -> None:
            n = kernel.bind(block * together + tirx.floordiv(thread, warps * WARP), -(-rows // together) * together)
            lane = kernel.bind(tirx.floormod(thread, warps * WARP), warps * WARP)
            columns = [lane + k * warps * WARP for k in range(each)]

            def folded(values: Any, fold: Callable[[Any, Any], Any], name: str) -> Any:
                result = kernel.local("float32", name, 1)
                accumulate(result, [values[k] for k in range(each)], fold)
                fold_lanes(kernel, result, fold)
                if warps > 1:
                    shared = T.alloc_buffer((warps,), "float32", scope="shared", layout=None)
                    IRBuilder.name(f"{name}_of_warps", shared)
                    with kernel.when(tirx.floormod(lane, WARP) < 1):
                        T.buffer_store(shared, result[0], [tirx.floordiv(lane, WARP)])
                    barrier("shared")
                    accumulate(result, [shared[w] for w in range(warps)], fold)
                return result[0]

            with kernel.when(n < rows):  # all of a warp, and of a block that shares a row
                values, powers = (kernel.local("float32", name, each) for name in ("row", "powers"))
                for k, column in enumerate(columns):
                    T.buffer_store(values, tirx.const(float("-inf"), "float32"), [k])
                    with kernel.when(column < size):
                        T.buffer_store(values, kernel.value(row.at([n, column])), [k])
                highest = folded(values, tirx.max, "top")
                kernel.overrides[top.buffer] = lambda _: highest
                for k, column in enumerate(columns):
                    kernel.overrides[row.buffer] = everywhere(values[k])
                    power = kernel.value(exp.at([n, column]))
                    T.buffer_store(powers, tirx.Select(column < size, power, tirx.const(0.0, "float32")), [k])
                whole = folded(powers, lambda a, b: a + b, "total")
                kernel.overrides[total.buffer] = lambda _: whole
                factor = kernel.keep(kernel.value(scale.at([n, 0])), "float32", "scale_")
                kernel.overrides[scale.buffer] = lambda _: factor
                for k, column in enumerate(columns):
                    kernel.overrides[exp.buffer] = everywhere(powers[k])
                    with kernel.when(column < size):
                        for stage in graph.outputs:
                            kernel.store(stage.buffer, [n, column], kernel.stage(stage, [n, column]))

        return build(graph, -(-rows // together), threads, body)
