"""Single convolutions and whole networks on a GPU, each among its peers: rows of the report."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cuda_limits, cuda_peers
from benchmarks.cuda_device import Contender, Gpu, Graph, Kernel, Memory, interleaved, latencies
from benchmarks.cuda_inputs import image
from benchmarks.cuda_limits import Limits
from benchmarks.cuda_peers import Torch
from bnncc.runtime.session import Session, load

#: Runs of a convolution in one graph: launching one takes longer than the smallest of them.
REPEATS = 20
#: Calls of which the median is a latency.
_CALLS, _FEWEST_CALLS = 300, 20
_SEED = 7  # of the images, as `benchmarks.cuda_build` has it


class Bench:
    """What all items share. torch: None with `why_not`. seconds: to measure an item for."""

    def __init__(self, gpu: Gpu, files: Path, limits: Limits | None, torch: Torch | None, why_not: str) -> None:
        self.gpu, self.files, self.limits, self.torch, self.why_not = gpu, files, limits, torch, why_not
        self.best_for_bits = ""

    def measure_limits(self, seconds: float) -> dict[str, dict[str, float]]:
        """`Limits.measure`, after which convolutions know what to be compared with."""
        if self.limits is None:
            return {}
        measured = self.limits.measure(self.gpu, seconds)
        self.best_for_bits = cuda_limits.best_for_bits(measured)
        return measured

    # -- convolutions ------------------------------------------------------------------------------------------------

    def convolution(self, entry: Mapping[str, Any], batch: int, seconds: float) -> dict[str, Any]:
        """A binary convolution as it stands between two others, bits in and bits out, from a folder's index: its
        kernels alone, on what lies in the GPU's memory, in turns with the limit's kernel and with torch."""
        row = entry["batches"][str(batch)]
        with load(self.files / row["artifact"], device=f"cuda:{self.gpu.index}") as session:
            (port,) = session.inputs
            _, channels, size, _ = port["shape"]
            one = image((1, channels, size, size), _SEED)
            self._check(session, np.repeat(one, batch, axis=0), np.load(self.files / entry["expected"])["arr_0"])
            session.run_steps(0, row["first"])  # its input, over which later steps wrote
            graph = self._steps(session, self.files / row["image"], row["first"], row["steps"])
            peers, missing = cuda_peers.contenders(
                self.torch, self.why_not, cuda_peers.KINDS[:2],
                lambda torch, kind: torch.convolution(kind, size, channels, batch, REPEATS),
            )  # fmt: skip
            contenders: dict[str, Contender] = {"bnncc": graph.launch, **peers}
            if self.limits and self.best_for_bits:
                contenders["limit"] = self.limits.contender(self.best_for_bits)
            medians = interleaved(self.gpu, contenders, seconds)
        limit = medians.pop("limit", None)
        medians = {name: took / REPEATS for name, took in medians.items()}
        tops = 2e-12 * row["macs"] / medians["bnncc"]
        found = {**_comparison(medians), "missing": missing, "tops": round(tops, 2)}
        if self.limits and limit:
            most = 1e-12 * self.limits.rate(self.best_for_bits, limit)
            found |= {"limit_tops": round(most, 2), "limit_by": self.best_for_bits, "share_of_limit": tops / most}
        self._forget()
        return found

    def _check(self, session: Session, array: np.ndarray, expected: np.ndarray) -> None:
        """The same image in all places of the batch gives the same in all places."""
        if not all(np.array_equal(sample, expected[0]) for sample in session(array)):
            raise RuntimeError(f"{session.manifest['name']}: differs from eager, so that its time means nothing")

    def _steps(self, session: Session, cubin: Path, first: int, count: int) -> Graph:
        """`REPEATS` times these steps, on the session's own memory."""
        device = session.version["device"]
        if device is None:
            raise RuntimeError(f"{session.manifest['name']} is for a CPU")
        module = self.gpu.module(cubin.read_bytes())
        begin = len(session.version["init"]) + first
        library: Any = session._library
        kernels: list[Kernel] = []
        for launches in device["launches"][begin : begin + count]:
            for launch in launches:
                addresses = [int(library.tensor_data(session._instance.pointer, id_)) for id_ in launch["args"]]
                function = module.function(launch["function"], launch["shared_bytes"])
                kernels.append((function, launch["grid"], launch["block"], launch["shared_bytes"], addresses))
        return self.gpu.graph(kernels * REPEATS)

    # -- networks ----------------------------------------------------------------------------------------------------

    def network(self, entry: Mapping[str, Any], batch: int, seconds: float, compiled: bool) -> dict[str, Any]:
        """A network end to end: on the GPU's memory, by its clock; from pinned memory of the host's and back to it, by
        the wall's; and at batch 1 from the call to the end of the work. compiled: torch.compile, too."""
        kinds = cuda_peers.KINDS if compiled else cuda_peers.KINDS[:2]
        with load(self.files / entry["batches"][str(batch)], device=f"cuda:{self.gpu.index}") as session:
            shape = session.inputs[0]["shape"]
            array = image(shape, _SEED)
            ours = OnDevice(self.gpu, session, array)
            made, missing = cuda_peers.contenders(
                self.torch, self.why_not, kinds,
                lambda torch, kind: torch.network(kind, self.files / entry["twin"], shape),
            )  # fmt: skip
            on_gpu = {"bnncc": ours.run, **{kind: run for kind, (run, _) in made.items()}}
            from_host = {"bnncc": _pinned(session, array), **{kind: run for kind, (_, run) in made.items()}}
            medians = interleaved(self.gpu, on_gpu, seconds)
            calls = max(_FEWEST_CALLS, _CALLS // batch)
            found = {
                **_comparison(medians),
                "missing": missing,
                "images_per_second": {name: round(batch / took, 1) for name, took in medians.items()},
                "host_to_host": _comparison(latencies(self.gpu, from_host, calls)),
                "arena_bytes": session.version["arena_bytes"],
                "launches": sum(len(step) for step in (session.version["device"] or {})["launches"]),
            }
            if batch == 1:
                found["latency"] = _comparison(latencies(self.gpu, on_gpu, calls))
        self._forget()
        return found

    def _forget(self) -> None:
        if self.torch:
            self.torch.forget()


class OnDevice:
    """A session called on the GPU's memory without anything of Python's in between. run: puts a call in a stream.

    Raises RuntimeError where that gives another output than a call from the host's memory.
    """

    def __init__(self, gpu: Gpu, session: Session, array: np.ndarray) -> None:
        expected = session(array)
        self._session, self._form = session, (expected.shape, expected.dtype)
        self._input, self._output = gpu.allocate(array.nbytes), gpu.allocate(expected.nbytes)
        self._input.write(array)
        self._pointers = _pointer(self._input), _pointer(self._output)
        self.run(gpu.stream)
        gpu.synchronize()
        if not np.array_equal(self.output(), expected, equal_nan=True):
            raise RuntimeError(f"{session.manifest['name']}: buffers on the GPU give another output than the host's")

    def output(self) -> np.ndarray:
        """A copy of what the last run left."""
        return self._output.read(*self._form)

    def clear(self) -> None:
        """Overwrites the output, so that the next run has to write it."""
        self._output.write(np.full(self._output.size, 0xA5, np.uint8))

    def run(self, stream: int) -> None:
        library = self._session._library
        library.call("run_device", self._session._instance.pointer, *self._pointers, stream)


def _pointer(memory: Memory) -> Any:
    return (ctypes.c_void_p * 1)(memory.address)


def _pinned(session: Session, array: np.ndarray) -> Callable[[int], object]:
    (source,), outputs = session.pinned()
    source[...] = array
    return lambda stream: session(source, out=outputs)


def _comparison(seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Times of contenders, one of them "bnncc", as they stand in the JSON: "median_ms", and "times_faster" than each
    peer bnncc is."""
    theirs = {name: took for name, took in seconds.items() if name != "bnncc"}
    return {
        "median_ms": {name: round(1e3 * took, 5) for name, took in seconds.items()},
        "times_faster": {name: round(took / seconds["bnncc"], 3) for name, took in theirs.items()},
    }
