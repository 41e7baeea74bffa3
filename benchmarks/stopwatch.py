"""Times single steps of an artifact in this process, without Python between them."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.native_c import compile_c
from bnncc.runtime.session import Session


@functools.cache
def _library() -> ctypes.CDLL:
    library = compile_c(Path(__file__).with_name("stopwatch.c"))
    pointer = ctypes.c_void_p
    library.repeat.argtypes = [pointer, pointer, ctypes.c_int32, ctypes.c_int32, ctypes.c_long]
    library.lap.argtypes = [pointer, pointer, ctypes.c_int32, ctypes.c_int, ctypes.POINTER(ctypes.c_double)]
    return library


class Stopwatch:
    """Times the steps of a session, which runs on `inputs`."""

    def __init__(self, session: Session, inputs: Sequence[np.ndarray]) -> None:
        self._session = session
        library: Any = session._library  # its functions are found when it is loaded
        self._run = ctypes.cast(library.run_steps, ctypes.c_void_p)
        for tensor, array in zip(session.version["inputs"], inputs, strict=True):
            session.write(tensor, array)
        self._count = len(session.version["steps"])
        session.run_steps(0, self._count)

    def repeater(self, first: int, count: int, times: int) -> Callable[[], None]:
        """A function that runs `count` steps from `first` so many times, on what is in their tensors."""
        instance = self._session._instance.pointer

        def repeat() -> None:
            if _library().repeat(self._run, instance, first, count, times):
                raise self._session._library.failure()

        return repeat

    def laps(self, seconds: float, wall: bool = False) -> list[float]:
        """Median seconds of each step of the network as it runs from the first to the last, over and over.

        wall: by the wall's clock, where several threads compute; else by the CPU time of the process.
        """
        rounds: list[list[float]] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(rounds) < 3:
            times = (ctypes.c_double * (self._count + 1))()
            if _library().lap(self._run, self._session._instance.pointer, self._count, wall, times):
                raise self._session._library.failure()
            rounds.append([took - times[self._count] for took in times[: self._count]])
        return [max(0.0, statistics.median(step)) for step in zip(*rounds, strict=True)]
