"""Timing several contenders against each other on a machine that is never quite still."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol


class Elsewhere(Protocol):
    """A contender that runs in another process and times itself by the CPU time of that process."""

    def burst(self, seconds: float) -> list[float]:
        """Seconds of each of the calls that it makes in `seconds`, after one that warms up."""


Contender = Callable[[], object] | Elsewhere


def interleaved_medians(
    contenders: Mapping[str, Contender],
    seconds: float,
    burst: float = 0.02,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median seconds of a call of each contender, on the clock of its process's own CPU time.

    clock: another one, for contenders of several threads; those elsewhere keep theirs.

    Wall time would favour the fast: on a busy machine a call of 0.1 ms mostly runs undisturbed, one of 10 ms never
    does. Everything here runs on one thread, where both clocks agree on a quiet machine. The contenders take turns in
    bursts of `burst` seconds, so that a slow phase of the machine hits all alike, and never run at the same time; the
    first call of a burst warms the caches and is not counted. `seconds` is the time for all contenders together.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        _burst(run, 0.0, clock)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or not all(samples.values()):
        for name, run in contenders.items():
            samples[name] += _burst(run, burst, clock)
    return {name: statistics.median(times) for name, times in samples.items()}


def _burst(run: Contender, seconds: float, clock: Callable[[], float]) -> list[float]:
    if not callable(run):
        return run.burst(seconds)
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = clock()
        run()
        times.append(clock() - start)
    return times
