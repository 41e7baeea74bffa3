"""The other runtimes a network is timed on, each as a function without arguments that runs it once on one thread."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from torch import nn

from benchmarks.onnx_twins import float32_model, int8_model

Runner = Callable[[], object]


def runners(binary: nn.Module, twin: nn.Module, x: torch.Tensor) -> dict[str, Runner]:
    """Every peer by name. `twin` is the float network with the shapes and weights of `binary`; x is its input."""
    torch.set_num_threads(1)
    model = float32_model(twin, x)
    last = torch.channels_last
    twin_nhwc = copy.deepcopy(twin).to(memory_format=last)  # type: ignore[call-overload]
    return {
        "ORT fp32": _onnx(model, x.numpy(), twin(x).detach().numpy(), tolerance=1e-3),
        "ORT int8": _onnx(int8_model(model, x), x.numpy()),
        "torch fp32": _eager(twin, x),
        "torch fp32, NHWC": _eager(twin_nhwc, x.to(memory_format=last)),
        "torch binary": _eager(binary, x),
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
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(x)

    return run
