"""The float twins as ONNX files, in float32 and quantized to 8 bits: what ONNX Runtime is timed on."""

from __future__ import annotations

import operator
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import fx, nn


def float32_model(twin: nn.Module, x: torch.Tensor) -> bytes:
    """An ONNX model of a float twin (convolutions, batch norms, pools, ReLU, additions, one dense layer).

    Batch norms are left for ONNX Runtime to fold into the convolutions, as it does with exported models.
    """
    graph = fx.symbolic_trace(twin)
    writer = _Writer(dict(graph.named_modules()))
    for node in graph.graph.nodes:
        writer.add(node)
    with torch.no_grad():
        shapes = [list(tensor.shape) for tensor in (x, twin(x))]
    return writer.model(*shapes).SerializeToString()


def int8_model(model: bytes, x: torch.Tensor) -> bytes:
    """The same network with 8-bit unsigned activations and 8-bit signed weights, float in and float out.

    Unsigned by signed is the combination ONNX Runtime has its fast kernels for on x86; signed by signed is many times
    slower and would be no fair opponent.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, folded, target = (Path(folder) / f"{stage}.onnx" for stage in ("float32", "folded", "int8"))
        source.write_bytes(model)
        # Folds batch norms into the convolutions first, as ONNX Runtime's guide tells users to.
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


class _Writer:
    """Turns the nodes of a traced twin into ONNX nodes; every module kind that the twins have, and no other."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._names: dict[fx.Node, str] = {}
        self._output = ""

    def add(self, node: fx.Node) -> None:
        inputs = [self._names[source] for source in node.all_input_nodes]
        if node.op == "placeholder":
            self._names[node] = "input"
        elif node.op == "output":
            self._output = inputs[0]
        elif node.target is operator.add:
            self._emit(node, "Add", inputs)
        else:
            self._module(node, self._modules[str(node.target)], inputs)

    def _module(self, node: fx.Node, module: nn.Module, inputs: list[str]) -> None:
        if isinstance(module, nn.Identity):
            self._names[node] = inputs[0]
        elif isinstance(module, nn.Conv2d):
            inputs += self._held(node, weight=module.weight)
            pads = [*module.padding, *module.padding]
            self._emit(node, "Conv", inputs, kernel_shape=module.kernel_size, strides=module.stride, pads=pads)
        elif isinstance(module, nn.BatchNorm2d):
            inputs += self._held(
                node, scale=module.weight, bias=module.bias, mean=module.running_mean, var=module.running_var
            )
            self._emit(node, "BatchNormalization", inputs, epsilon=module.eps)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            size, step, pad = ([value] * 2 for value in (module.kernel_size, module.stride, module.padding))
            kind = "MaxPool" if isinstance(module, nn.MaxPool2d) else "AveragePool"
            self._emit(node, kind, inputs, kernel_shape=size, strides=step, pads=pad * 2)
        elif isinstance(module, nn.Linear):
            inputs += self._held(node, weight=module.weight, bias=module.bias)
            self._emit(node, "Gemm", inputs, transB=1)
        else:
            kinds = {nn.ReLU: "Relu", nn.AdaptiveAvgPool2d: "GlobalAveragePool", nn.Flatten: "Flatten"}
            self._emit(node, kinds[type(module)], inputs)

    def _held(self, node: fx.Node, **tensors: torch.Tensor | None) -> list[str]:
        for key, tensor in tensors.items():
            assert tensor is not None  # the twins' batch norms have statistics
            self._weights.append(numpy_helper.from_array(tensor.detach().numpy(), f"{node.name}.{key}"))
        return [f"{node.name}.{key}" for key in tensors]

    def _emit(self, node: fx.Node, kind: str, inputs: list[str], **attributes: Any) -> None:
        self._names[node] = node.name
        self._nodes.append(helper.make_node(kind, inputs, [node.name], name=node.name, **attributes))

    def model(self, shape_in: list[int], shape_out: list[int]) -> onnx.ModelProto:
        float32 = onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            "twin",
            [helper.make_tensor_value_info("input", float32, shape_in)],
            [helper.make_tensor_value_info(self._output, float32, shape_out)],
            self._weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        return model
