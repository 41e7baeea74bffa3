"""The search for better register tiles: `bnncc compile --tune`.

For each kernel of a network that takes a register tile, the longest first, the candidates of `rules.candidates` are
built and compared with the default. What wins by more than `_GAIN` twice goes into the database (`tuning`), and the
default where nothing does, so that no kernel is searched a second time. On a target that this machine runs, kernels are
timed here on one thread; for another of ARM, llvm-mca estimates the cycles of their inner loops (`mca`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tvm
from tvm import tirx

from bnncc.runtime.cpu import host_architecture, host_features
from bnncc.runtime.errors import BnnccError

from . import emit, mca
from .descriptor import AnyTarget, TargetSpec
from .rules.candidates import candidates
from .rules.tiles import Tile, TileRequest, Tiles, default_tile
from .tuning import Database, Record, kernel_key

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

#: Candidates of one kernel, the default among them.
_CANDIDATES = 12
#: By how much a tile must beat the default, in the search and when both are measured again.
_GAIN = 0.02
#: Seconds of measuring: each candidate, both again, and each kernel of the network.
_SEARCH, _REPEAT, _SURVEY = 0.05, 0.4, 0.02
#: Seconds of uninterrupted runs of one contender.
_BURST = 1e-3


@dataclass(frozen=True)
class Summary:
    """What a search came to.

    searched: kernels with a record of this run. improved: those of them with another tile than the default. left: those
    that there was no time for. before, after: of all kernels together, with default tiles and with recorded ones.
    """

    target: str
    searched: int
    improved: int
    left: int
    before: float
    after: float
    unit: str

    @property
    def gain(self) -> float:
        """The part of the network's time that tuning saves."""
        return 1 - self.after / self.before if self.before else 0.0

    def __str__(self) -> str:
        of = "the network's time" if self.unit == "seconds" else "the inner loops' cycles by llvm-mca"
        left = f"; no time for {self.left} more" if self.left else ""
        return (
            f"tuned {self.searched} kernels for {self.target}, {self.improved} of them with a better tile{left}: "
            f"what is recorded saves {100 * self.gain:.1f} % of {of}"
        )


def tune(
    kernels: Mapping[str, tirx.PrimFunc],
    calls: Mapping[str, int],
    target: TargetSpec,
    database: Database,
    seconds: float,
    progress: Progress,
) -> Summary:
    """Searches until all kernels have a record or the time is over, and writes the database after each.

    kernels: unscheduled. calls: how often a run of the network calls each. Raises BnnccError as `check`.
    """
    deadline = time.monotonic() + seconds
    judge = _judge(target)
    progress("tune: what each kernel takes", 0, 1)
    kernels = {name: func for name, func in kernels.items() if calls.get(name)}
    requests = {name: request for name, func in kernels.items() if (request := request_of(func, target))}
    alone = judge.survey(kernels, requests)
    shared: dict[str, list[str]] = {}
    for name, request in requests.items():
        if name in alone:
            shared.setdefault(kernel_key(request), []).append(name)
    cost = {key: sum(calls[name] * alone[name] for name in names) for key, names in shared.items()}
    queue = [
        max(shared[key], key=lambda name: calls[name] * alone[name])
        for key in sorted(cost, key=lambda key: -cost[key])
        if database.tiles(target).of(requests[shared[key][0]]) is None
    ]
    searched = improved = 0
    for name in queue:
        if searched and time.monotonic() > deadline:
            break
        progress(f"tune: {name}", searched, len(queue))
        record = _search(judge, kernels[name], requests[name])
        database.add(target, requests[name], record)
        database.write()
        searched += 1
        improved += record.best != record.default
    tiles = database.tiles(target)
    saved = 0.0
    for key, names in shared.items():
        if found := tiles.of(requests[names[0]]):
            saved += cost[key] * (1 - found.after / found.before)
    before = sum(calls[name] * took for name, took in alone.items())
    return Summary(target.name, searched, improved, len(queue) - searched, before, before - saved, judge.unit)


def check(targets: Iterable[AnyTarget], database: Database) -> None:
    """Raises BnnccError if a target can be neither run nor estimated, or the database cannot be written."""
    for target in targets:
        if not isinstance(target, TargetSpec):
            raise BnnccError(f"cannot tune for target {target.name}: the tiles of GPUs are chosen by rule")
        _judge(target)
    database.write()


def _judge(target: TargetSpec) -> _Judge:
    return _Measured(target) if runs_here(target) else _Modelled(target)


def runs_here(target: TargetSpec) -> bool:
    """Whether kernels of a target can run in this process."""
    features = host_features()
    return target.arch == host_architecture() and (features is None or set(target.features) <= features)


def request_of(func: tirx.PrimFunc, target: TargetSpec) -> TileRequest | None:
    """What the rule that takes a kernel asks; None for one without a register tile."""
    asked: list[TileRequest] = []

    def record(request: TileRequest) -> Tile:
        asked.append(request)
        return request.default

    _scheduled(func, target, record)
    return asked[-1] if asked else None


def _search(judge: _Judge, func: tirx.PrimFunc, request: TileRequest) -> Record:
    tiles = candidates(request, _CANDIDATES)
    trial = judge.trial(func, tiles)
    took = trial.times(range(len(tiles)), _SEARCH)
    best = min(took, key=lambda index: took[index])
    if best and took[best] < (1 - _GAIN) * took[0]:
        again = trial.times((0, best), _REPEAT)
        if again[best] < (1 - _GAIN) * again[0]:
            logger.debug("%s: %s instead of %s", kernel_key(request), tiles[best], tiles[0])
            return Record(tiles[0], tiles[best], again[0], again[best], judge.unit)
    return Record(tiles[0], tiles[0], took[0], took[0], judge.unit)


class _Trial(Protocol):
    """A kernel with several tiles, the first the default."""

    def times(self, which: Sequence[int], seconds: float) -> dict[int, float]:
        """What a call of each takes, given so many seconds for each; never more than it may take again."""


class _Judge(Protocol):
    unit: str

    def survey(self, kernels: Mapping[str, tirx.PrimFunc], requests: Mapping[str, TileRequest]) -> dict[str, float]:
        """What a call of each kernel takes with its default tile, without those it can say nothing about."""

    def trial(self, func: tirx.PrimFunc, tiles: Sequence[Tile]) -> _Trial: ...


class _Measured:
    """Times kernels in this process."""

    unit = "seconds"

    def __init__(self, target: TargetSpec) -> None:
        self.target = target

    def survey(self, kernels: Mapping[str, tirx.PrimFunc], requests: Mapping[str, TileRequest]) -> dict[str, float]:
        functions = {name: _scheduled(func, self.target, default_tile, name) for name, func in kernels.items()}
        module = emit.build_scheduled(tvm.IRModule(functions), self.target).jit()
        return {name: _fastest({0: (module, name)}, _arguments(func), _SURVEY)[0] for name, func in kernels.items()}

    def trial(self, func: tirx.PrimFunc, tiles: Sequence[Tile]) -> _Trial:
        return _Timed(func, tiles, self.target)


class _Timed:
    def __init__(self, func: tirx.PrimFunc, tiles: Sequence[Tile], target: TargetSpec) -> None:
        names = [f"tile{index}" for index in range(len(tiles))]
        functions = {name: _with_tile(func, target, tile, name) for name, tile in zip(names, tiles, strict=True)}
        module = emit.build_scheduled(tvm.IRModule(functions), target).jit()
        self._arguments = _arguments(func)
        results = [self._results(module, name) for name in names]
        self._contenders = {}
        for index, name in enumerate(names):
            if all(map(_same, results[0], results[index])):
                self._contenders[index] = (module, name)
            else:
                logger.warning("%s: %s does not compute what the default does", target.name, tiles[index])

    def _results(self, module: Any, name: str) -> list[np.ndarray]:
        """What all arguments hold after a call on copies of them."""
        copies = [tvm.runtime.tensor(a.numpy()) for a in self._arguments]
        module[name](*copies)
        return [a.numpy() for a in copies]

    def times(self, which: Sequence[int], seconds: float) -> dict[int, float]:
        contenders = {index: c for index, c in self._contenders.items() if index in which}
        return _fastest(contenders, self._arguments, seconds)


def _fastest(contenders: Mapping[int, tuple[Any, str]], arguments: Sequence[Any], seconds: float) -> dict[int, float]:
    """Seconds of the fastest of many calls of each, in turns, so that a slow phase of the machine hits all alike."""
    with _one_thread():
        device = tvm.cpu()
        once = {i: m.time_evaluator(n, device, number=1)(*arguments).mean for i, (m, n) in contenders.items()}
        bursts = {
            i: m.time_evaluator(n, device, number=max(1, min(1000, int(_BURST / 4 / max(once[i], 1e-7)))), repeat=4)
            for i, (m, n) in contenders.items()
        }
        fastest = dict.fromkeys(contenders, math.inf)
        end = time.monotonic() + seconds * len(contenders)
        rounds = 0
        while rounds < 3 or time.monotonic() < end:
            for index, burst in bursts.items():
                fastest[index] = min(fastest[index], *burst(*arguments).results)
            rounds += 1
    return fastest


@contextmanager
def _one_thread() -> Iterator[None]:
    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(1, 1)
    try:
        yield
    finally:
        configure(1, 0)


def _arguments(func: tirx.PrimFunc) -> list[Any]:
    """Something for every parameter: floats around 0, any bits, and small integers, the same for every tile."""
    draw = np.random.default_rng(0)
    arrays = []
    for param in func.params:
        shape, dtype = [int(e) for e in param.shape], np.dtype(str(param.dtype))
        if dtype.kind == "f":
            array = draw.standard_normal(shape).astype(dtype)
        elif dtype.kind == "b":
            array = draw.integers(0, 2, shape).astype(dtype)
        elif dtype.kind == "i" and dtype.itemsize > 1:
            array = draw.integers(-100, 100, shape).astype(dtype)
        else:
            bits = draw.integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
            array = bits.view(dtype).reshape(shape)
        arrays.append(tvm.runtime.tensor(array))
    return arrays


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


class _Modelled:
    """Estimates inner loops by llvm-mca."""

    unit = "cycles"

    def __init__(self, target: TargetSpec) -> None:
        if target.arch not in mca.ARCHITECTURES:
            raise BnnccError(
                f"cannot tune for target {target.name}: this machine cannot run its code, and llvm-mca estimates only "
                "that of ARM"
            )
        mca.tool()
        self.target = target

    def survey(self, kernels: Mapping[str, tirx.PrimFunc], requests: Mapping[str, TileRequest]) -> dict[str, float]:
        found = {
            name: _cycles(kernels[name], request, request.default, self.target) for name, request in requests.items()
        }
        return {name: cycles for name, cycles in found.items() if math.isfinite(cycles)}

    def trial(self, func: tirx.PrimFunc, tiles: Sequence[Tile]) -> _Trial:
        request = request_of(func, self.target)
        assert request is not None
        return _Estimated([_cycles(func, request, tile, self.target) for tile in tiles])


@dataclass(frozen=True)
class _Estimated:
    cycles: Sequence[float]

    def times(self, which: Sequence[int], seconds: float) -> dict[int, float]:
        return {index: self.cycles[index] for index in which}


def _cycles(func: tirx.PrimFunc, request: TileRequest, tile: Tile, target: TargetSpec) -> float:
    """Cycles of the inner loops of one call: those over whole tiles, and over the columns that are left.

    A loop is known by the bytes of weights that an iteration takes. What is around it, the epilogue too, is left out.
    inf: there is no such loop, because all steps are unrolled.
    """
    built = emit.build_scheduled(tvm.IRModule({"kernel": _with_tile(func, target, tile)}), target)
    code = mca.read_assembly(str(built.mod.inspect_source("asm")))
    loops = [body for body in mca.inner_loops(mca.basic_blocks(code)) if any(i.weight_bytes for i in body)]
    if not loops:
        return math.inf
    model = mca.model_of(target.arch, target.cpu)
    taken = [sum(i.weight_bytes for i in body) for body in loops]
    took = list(zip(taken, mca.cycles_of(loops, model, arch=target.arch), strict=True))
    shape = request.shape
    step = shape.weight_bytes // (shape.groups * shape.blocks * shape.steps)  # of one vector
    rest = shape.width % tile.cols

    def per_byte(cols: int) -> float:
        unit = max(1, tile.rows * cols // request.together * tile.vectors * step)
        return min((cycles / size for size, cycles in took if size % unit == 0), default=math.inf)

    whole = per_byte(tile.cols)
    left = per_byte(rest) if rest else whole
    bytes_of_pixel = shape.weight_bytes * shape.images * shape.height
    return bytes_of_pixel * ((shape.width - rest) * whole + rest * (left if math.isfinite(left) else whole))


def _with_tile(func: tirx.PrimFunc, target: TargetSpec, tile: Tile, name: str = "kernel") -> tirx.PrimFunc:
    return _scheduled(func, target, lambda _: tile, name)


def _scheduled(func: tirx.PrimFunc, target: TargetSpec, tiles: Tiles, name: str = "kernel") -> tirx.PrimFunc:
    """A kernel under a name, with its schedule."""
    mod = emit.schedule(tvm.IRModule({name: func.with_attr("global_symbol", name)}), target, tiles)
    return mod[name]
