"""torch on a GPU: the same convolution, and the float twin of a network, each captured in a CUDA graph.

channels_last in all of them, cuDNN's own search for the fastest algorithm, and float32 that is float32: without tf32,
which has ten bits of mantissa. Everything runs in a stream that is not torch's, so that the artifact's clock times it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda_device import Contender, Gpu, Unavailable

KINDS = ("torch fp16", "torch fp32", "torch.compile fp16", "torch.compile fp32")


class Torch:
    """torch on a GPU. Raises Unavailable with the reason where it cannot be used."""

    def __init__(self, gpu: Gpu) -> None:
        try:
            import torch
        except ImportError as error:
            raise Unavailable(f"torch is not installed ({error})") from None
        if not torch.cuda.is_available():
            raise Unavailable(f"torch {torch.__version__} sees no GPU")
        self._torch: Any = torch
        self.version = str(torch.__version__)
        self._device = torch.device("cuda", gpu.index)
        torch.cuda.set_device(self._device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.set_grad_enabled(False)
        # Once for all: entering a stream for each replay would cost torch microseconds.
        self._stream = torch.cuda.ExternalStream(gpu.stream, device=self._device)
        torch.cuda.set_stream(self._stream)

    def convolution(self, kind: str, size: int, channels: int, batch: int, repeats: int) -> Contender:
        """So many runs of a 3×3 convolution of that shape; `kind` is of the first two of `KINDS`."""
        torch = self._torch
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return self._captured(layer, kind, (batch, channels, size, size), repeats)[0]

    def network(self, kind: str, source: Path, shape: Sequence[int]) -> tuple[Contender, Contender]:
        """A run of the twin on an image in the GPU's memory; and one from the host's pinned memory and back to it."""
        spec = importlib.util.spec_from_file_location(f"twin_{source.stem}", source)
        if spec is None or spec.loader is None:
            raise Unavailable(f"{source} is no Python")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._torch.manual_seed(0)
        run, image, result = self._captured(module.Twin().eval(), kind, tuple(shape), 1)
        host, back = image.cpu().pin_memory(), result.cpu().pin_memory()

        def from_host(stream: int) -> None:
            image.copy_(host, non_blocking=True)
            run(stream)
            back.copy_(result, non_blocking=True)

        return run, from_host

    def _captured(self, model: Any, kind: str, shape: tuple[int, ...], repeats: int) -> tuple[Contender, Any, Any]:
        torch = self._torch
        dtype = torch.float16 if kind.endswith("fp16") else torch.float32
        last = torch.channels_last
        model = model.to(self._device, dtype).to(memory_format=last)
        x = torch.randn(shape, device=self._device).to(dtype).contiguous(memory_format=last)
        if kind.startswith("torch.compile"):
            torch._dynamo.reset()
            model = torch.compile(model, mode="max-autotune-no-cudagraphs")  # the graph is captured below, as for all
        graph = torch.cuda.CUDAGraph()
        for _ in range(3):  # what is found and allocated at first is not part of the graph
            result = model(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                result = model(x)

        def run(stream: int) -> None:
            graph.replay()

        run.__dict__["holds"] = (model, x, result, graph)  # as long as the contender
        return run, x, result

    def forget(self) -> None:
        """Gives back the memory of contenders that are gone."""
        self._torch.cuda.synchronize()
        self._torch.cuda.empty_cache()


def contenders(
    torch: Torch | None, why_not: str, kinds: Sequence[str], make: Callable[[Torch, str], Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `make` makes of each kind, and why it does not of the others."""
    found, missing = {}, {}
    for kind in kinds:
        if torch is None:
            missing[kind] = why_not
            continue
        try:
            found[kind] = make(torch, kind)
        except Exception as error:  # whatever a peer fails at is no reason to measure nothing
            missing[kind] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return found, missing


__all__ = ["KINDS", "Torch", "contenders"]
