"""The other runtimes a network is timed on, each as a function without arguments that runs it once on one thread."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnxruntime
import torch
from torch import nn

from benchmarks.onnx_twins import float32_model, int8_model

Runner = Callable[[], object]

PEERS = ("ORT fp32", "ORT int8", "torch fp32", "torch fp32, NHWC", "torch.compile", "torch binary")


def runners(
    twin: nn.Module, x: torch.Tensor, binary: nn.Module | None = None, which: Sequence[str] = PEERS
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Those of `PEERS` that run, by name, and why the others do not.

    twin: the float network with the shapes and weights of `binary`. x: its input.
    """
    torch.set_num_threads(1)
    last = torch.channels_last
    makers: dict[str, Callable[[], Runner]] = {
        "ORT fp32": lambda: _onnx(float32_model(twin, x), x.numpy(), twin(x).detach().numpy(), tolerance=1e-3),
        "ORT int8": lambda: _onnx(int8_model(float32_model(twin, x), x), x.numpy()),
        "torch fp32": lambda: _eager(twin, x),
        "torch fp32, NHWC": lambda: _eager(copy.deepcopy(twin).to(memory_format=last), x.to(memory_format=last)),  # type: ignore[call-overload]
        "torch.compile": lambda: _compiled(twin, x),
    }
    if binary is not None:
        makers["torch binary"] = lambda: _eager(binary, x)
    found, missing = {}, {}
    for name, make in makers.items():
        if name in which:
            try:
                found[name] = make()
            except Exception as error:  # whatever a peer fails at is no reason to measure nothing
                missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return found, missing


def comparison(seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Times of contenders, one of them "bnncc", as they stand in the JSON: "median_ms", and "times_faster" than each
    peer bnncc is. "LCE best" is the fastest of LCE's options."""
    ours = {name: value for name, value in seconds.items() if name.startswith("bnncc")}
    theirs = {name: value for name, value in seconds.items() if name not in ours}
    if options := [value for name, value in theirs.items() if name.startswith("LCE")]:
        theirs["LCE best"] = min(options)
    return {
        "median_ms": {name: round(1e3 * value, 4) for name, value in (ours | theirs).items()},
        "times_faster": {name: round(value / seconds["bnncc"], 2) for name, value in theirs.items()},
    }


def _onnx(model: bytes, x: np.ndarray, expected: np.ndarray | None = None, tolerance: float = 0.0) -> Runner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    if expected is not None:
        difference = np.abs(session.run(None, {"input": x})[0] - expected).max()
        if difference > tolerance * np.abs(expected).max():
            raise RuntimeError(
                f"the ONNX model differs from its PyTorch twin by {difference}: the timing means nothing"
            )
    return lambda: session.run(None, {"input": x})


def _eager(model: nn.Module, x: torch.Tensor) -> Runner:
    def run() -> object:
        with torch.inference_mode():
            return model(x)

    return run


def _compiled(model: nn.Module, x: torch.Tensor) -> Runner:
    """torch.compile with inductor; freezing lets it lay out weights beforehand, as bnncc does."""
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch(freezing=True, compile_threads=1):
        model = torch.compile(model)  # type: ignore[assignment]

        def run() -> object:
            with torch.no_grad():
                return model(x)

        run()
    return run
