"""Random small networks of any shape, for hypothesis: branches that part and meet again, of the layers in `operations`.

A network is drawn step by step, on the value that eager has there; a step that PyTorch refuses is left out. Its repr is
a program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from .operations import BETWEEN, BINARY, CHAIN, LAYERS, Apply, Draw, Kind, Made, Operation, Value

#: Elements of the largest value: the kernels of a network are small, compiling them is what takes time.
_LARGEST = 20_000

_CHANNELS = (1, 3, 8, 2, 4, 6, 16, 24, 32, 33, 64)
_EXTENTS = {1: (8, 1, 5, 12), 2: (4, 1, 5, 7, 8), 3: (3, 1, 2, 4)}


@dataclass(frozen=True)
class Step:
    """reads: numbers of the values it reads; 0 is the input, i + 1 the result of step i."""

    text: str
    reads: tuple[int, ...]
    module: nn.Module


@dataclass(frozen=True)
class Graph:
    """A network of one input and one or several outputs, numbers of values. text: what the input is."""

    text: str
    input: torch.Tensor
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def module(self) -> nn.Module:
        return _Network(self.steps, self.outputs).eval()

    def __repr__(self) -> str:
        names = ["x", *(f"v{index}" for index in range(1, len(self.steps) + 1))]
        lines = [f"x = {self.text}"]
        for name, step in zip(names[1:], self.steps, strict=True):
            lines.append(f"{name} = {step.text} of {', '.join(names[i] for i in step.reads)}")
        return "\n".join([*lines, f"return {', '.join(names[i] for i in self.outputs)}"])

    def smaller(self) -> Iterator[Graph]:
        """What still runs of it: with one of its outputs alone, and without one of its steps (who reads that step then
        reads the step's operand)."""
        if len(self.outputs) > 1:
            yield from (self._with(range(len(self.steps) + 1), [output]) for output in self.outputs)
        for left_out, step in enumerate(self.steps, 1):
            same = [step.reads[0] if i == left_out else i for i in range(len(self.steps) + 1)]
            graph = self._with(same, [same[output] for output in self.outputs])
            if graph.outputs and _runs(graph):
                yield graph

    def _with(self, same: Sequence[int], outputs: Sequence[int]) -> Graph:
        """Without what the outputs do not need. same: value → the value that takes its place."""
        needed, pending = set(), list(outputs)
        while pending:
            if (index := pending.pop()) and index not in needed:
                needed.add(index)
                pending += [same[i] for i in self.steps[index - 1].reads]
        number = {0: 0} | {index: place for place, index in enumerate(sorted(needed), 1)}
        kept = [self.steps[index - 1] for index in sorted(needed)]
        steps = tuple(Step(s.text, tuple(number[same[i]] for i in s.reads), s.module) for s in kept)
        return Graph(self.text, self.input, steps, tuple(sorted({number[o] for o in outputs if o})))


def _runs(graph: Graph) -> bool:
    try:
        graph.module()(graph.input)
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


class _Network(nn.Module):
    def __init__(self, steps: Sequence[Step], outputs: Sequence[int]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(step.module for step in steps)
        self.reads = [step.reads for step in steps]
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x]
        for step, reads in zip(self.steps, self.reads, strict=True):
            values.append(step(*(values[i] for i in reads)))
        return tuple(values[i] for i in self.outputs)


@st.composite
def graphs(draw: Draw) -> Graph:
    """Networks of at most 12 steps."""
    rank = draw(st.sampled_from((2, 2, 0, 1, 3)))
    shape = (draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from(_CHANNELS)))
    shape += tuple(draw(st.sampled_from(_EXTENTS[rank])) for _ in range(rank))
    seed, text, plain = draw(st.integers(0, 999)), draw(st.sampled_from(_LIKELY)), draw(st.booleans())
    torch.manual_seed(seed)
    kind, numbers = _INPUTS[text]
    values = [Value(kind, True, numbers(shape), plain)]
    steps: list[Step] = []
    shown: set[int] = set()
    ahead: list[Sequence[Operation]] = []  # what follows on the latest value
    for _ in range(draw(st.integers(1, 12))):
        index = len(values) - 1
        if ahead:
            made, reads = draw(st.sampled_from(ahead.pop()))(draw, values[index]), (index,)
        else:
            index -= 0 if draw(st.booleans()) else draw(st.integers(0, index))
            if draw(st.integers(0, 7)) == 7:
                made, reads = _join(draw, values, index)
            else:
                operations = draw(st.sampled_from((BETWEEN, LAYERS)))
                made, reads = draw(st.sampled_from(operations))(draw, values[index]), (index,)
            if made is not None and made.product and draw(st.integers(0, 3)):
                ahead = [BINARY, *[CHAIN] * draw(st.integers(1, 2))]
        result = None if made is None else _run(made, [values[i] for i in reads], seed + 1000 * len(values))
        if made is not None and result is not None:
            steps.append(Step(made.text, reads, result[0]))
            exact = made.exact and all(values[i].exact for i in reads)
            values.append(Value(made.kind, exact, result[1], plain, made.product))
            if draw(st.integers(0, 11)) == 11:
                shown.add(len(steps))
    read = {index for step in steps for index in step.reads}
    outputs = tuple(i for i in range(1, len(values)) if i in shown or i not in read)
    return Graph(f"{text} of shape {list(shape)}, seed {seed}", values[0].sample, tuple(steps), outputs)


def _join(draw: Draw, values: Sequence[Value], index: int) -> tuple[Made | None, tuple[int, ...]]:
    """A sum of a value and another of its shape, or a concatenation with one that fits, else with itself."""
    x = values[index]
    add = draw(st.booleans())
    axes = [axis for axis in range(x.sample.ndim) if add or axis != 1]
    fitting = [
        i
        for i, v in enumerate(values)
        if i != index and v.sample.ndim == x.sample.ndim and all(v.sample.shape[a] == x.sample.shape[a] for a in axes)
    ]
    if add and not fitting:
        return None, ()
    other = draw(st.sampled_from(fitting)) if fitting else index
    kind, exact = max(x.kind, values[other].kind), x.exact and values[other].exact
    if kind >= Kind.WILD and not exact:
        return None, ()  # rounding errors beside numbers of any size would be anything
    if add:
        return Made("add", lambda: Apply(torch.add), kind), (index, other)
    return Made("concat", lambda: Apply(lambda *parts: torch.cat(parts, 1)), kind), (index, other)


def _run(made: Made, operands: Sequence[Value], seed: int) -> tuple[nn.Module, torch.Tensor] | None:
    """The module, and what it makes of its operands; None where PyTorch refuses or the result is too large."""
    torch.manual_seed(seed)
    try:
        module = made.make().eval()
        if any(isinstance(m, _WEIGHTED) for m in module.modules()):
            _sprinkle_zeros(module)
        with torch.no_grad():
            result: Any = module(*(value.sample for value in operands))
    except (RuntimeError, ValueError):
        return None
    return (module, result) if 0 < result.numel() <= _LARGEST else None


_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def _sprinkle_zeros(module: nn.Module) -> None:
    """Every tenth weight becomes 0 or −0; never the first, since weights of nothing but zeros quantize to NaN."""
    for name, weight in module.named_parameters():
        if name.endswith("weight"):
            flat = weight.data.reshape(-1)
            zero = torch.rand(flat.shape) < 0.1
            zero[0] = False
            flat[zero] = torch.where(torch.rand(flat.shape) < 0.5, 0.0, -0.0)[zero]
            weight.data = flat.reshape(weight.shape)


# -- inputs ----------------------------------------------------------------------------------------------------------


def _grid(shape: Sequence[int]) -> torch.Tensor:
    """Multiples of ¼ between −2 and 2: thresholds of signs, ties of roundings and edges of clamps are among them."""
    x = torch.randint(-8, 9, tuple(shape)) / 4
    return torch.where((x == 0) & (torch.rand(tuple(shape)) < 0.5), -0.0, x)


def _thirds(shape: Sequence[int]) -> torch.Tensor:
    """Ties of DoReFa's roundings, k + ½ parts of 1, 3, 7 and 15, as nearly as floats have them."""
    parts = torch.tensor([1.0, 3.0, 7.0, 15.0])[torch.randint(4, tuple(shape))]
    return (torch.randint(-3, 16, tuple(shape)) + 0.5) / parts


def _normal(shape: Sequence[int]) -> torch.Tensor:
    return torch.where(torch.rand(tuple(shape)) < 0.05, 0.0, torch.randn(*shape))


def _awkward(shape: Sequence[int]) -> torch.Tensor:
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3e38])
    picks = odd[torch.randint(len(odd), tuple(shape))]
    return torch.where(torch.rand(tuple(shape)) < 0.2, picks, torch.randn(*shape))


_INPUTS: dict[str, tuple[Kind, Any]] = {
    "quarters": (Kind.GRID, _grid),
    "normal": (Kind.FLOAT, _normal),
    "ties of roundings": (Kind.FLOAT, _thirds),
    "NaN and infinities": (Kind.NAN, _awkward),
}
# Infinities and NaN stop most of what comes behind them from being interesting.
_LIKELY = [name for name, times in zip(_INPUTS, (3, 2, 2, 1), strict=True) for _ in range(times)]
