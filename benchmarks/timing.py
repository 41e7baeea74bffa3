"""Timing several contenders against each other on a machine that is never quite still."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(
    contenders: Mapping[str, Callable[[], object]], seconds: float, burst: float = 0.02
) -> dict[str, float]:
    """Median seconds of a call of each contender, on the clock of this process's own CPU time.

    Wall time would favour the fast: on a busy machine a call of 0.1 ms mostly runs undisturbed, one of 10 ms never
    does. Everything here runs on one thread, where both clocks agree on a quiet machine. The contenders take turns in
    bursts of `burst` seconds, so that a slow phase of the machine hits all alike; the first call of a burst warms the
    caches and is not counted. `seconds` is the time for all contenders together.
    """
    for run in contenders.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or not all(samples.values()):
        for name, run in contenders.items():
            run()
            end = time.perf_counter() + burst
            while True:
                start = time.process_time()
                run()
                samples[name].append(time.process_time() - start)
                if time.perf_counter() > end:
                    break
    return {name: statistics.median(times) for name, times in samples.items()}
