"""The float twins as ONNX files, in float32 and quantized to 8 bits: what ONNX Runtime is timed on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn


def float32_model(twin: nn.Module, x: torch.Tensor) -> bytes:
    """An ONNX model of a float twin. The exporter folds batch norms into the convolutions before them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float32.onnx"
        torch.onnx.export(twin, (x,), path, dynamo=False, opset_version=17, input_names=["input"])
        return path.read_bytes()


def int8_model(model: bytes, x: torch.Tensor) -> bytes:
    """The same network with 8-bit unsigned activations and 8-bit signed weights, float in and float out.

    Unsigned by signed is the combination ONNX Runtime has its fast kernels for on x86; signed by signed is many times
    slower and would be no fair opponent.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, folded, target = (Path(folder) / f"{stage}.onnx" for stage in ("float32", "folded", "int8"))
        source.write_bytes(model)
        # What ONNX Runtime's guide tells users to do first.
        quant_pre_process(source, folded)
        quantize_static(
            folded,
            target,
            _Calibration(x.numpy()),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        return target.read_bytes()


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Random inputs of the model's own distribution; accuracy is not what is measured."""

    def __init__(self, x: np.ndarray) -> None:
        generator = np.random.default_rng(0)
        self._batches = iter([{"input": generator.standard_normal(x.shape).astype("float32")} for _ in range(2)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)
