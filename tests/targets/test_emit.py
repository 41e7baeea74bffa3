"""From PrimFuncs to object files: every kernel of a network gets a schedule, on every target."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import te, tirx
from tvm.script import ir as I
from tvm.script import tirx as T

from bnncc.dialect import computes, computes_float
from bnncc.frontends.torch import export_model, to_relax
from bnncc.passes import pipeline
from bnncc.runtime.bits import BitLayout
from bnncc.targets import emit
from bnncc.targets.descriptor import TargetSpec, all_targets, get_target

from .kernels import aligned, prim_func


class Sign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x >= 0, 1.0, -1.0)


class BinaryConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(Sign()(x), (1, 1, 1, 1), value=-1.0)
        return nn.functional.conv2d(x, Sign()(self.weight), stride=self.stride, groups=self.groups)


class Network(nn.Module):
    """One of each kind of layer that the networks of the literature are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32))
        self.first = nn.Sequential(BinaryConv(32, 32, 3, bias=False), nn.BatchNorm2d(32), nn.PReLU(32))
        self.second = nn.Sequential(BinaryConv(32, 48, 3, 2, groups=2, bias=False), nn.BatchNorm2d(48), nn.Hardtanh())
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(32, 48, 1, bias=False), nn.BatchNorm2d(48))
        self.third = nn.Sequential(
            BinaryConv(48, 10, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x))
        x = x + self.first(x)
        x = self.second(x) + self.shortcut(x)
        return torch.softmax(self.third(x), -1)


@pytest.fixture(scope="module")
def exported() -> object:
    torch.manual_seed(0)
    return export_model(Network().eval(), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("target", [t.name for t in all_targets()] + ["native", "znver4"])
def test_no_kernel_of_a_network_is_left_to_naive_loops(exported: object, target: str) -> None:
    spec = get_target(target)
    lowered = pipeline.run(to_relax(exported).mod, spec)
    kernels = tvm.IRModule({gvar: f for gvar, f in lowered.functions_items() if isinstance(f, tirx.PrimFunc)})
    assert len(kernels.functions) > 8
    assert emit.unscheduled(emit.schedule(kernels, spec)) == []


def _two_kernels(word_bits: int, lanes: int) -> tvm.IRModule:
    layout = BitLayout.for_target(64, 1, word_bits, 16)
    x = te.placeholder((1, 6, 6, layout.words), layout.word_dtype, "x")
    w = te.placeholder((1, 64 // lanes, 3, 3, layout.words, lanes), layout.word_dtype, "w")
    first = prim_func([x, w], [computes.binary_conv2d(x, w, depth=576, out_channels=64)], "first")
    y = te.placeholder((1, 4, 4, 64), "float32", "y")
    second = prim_func([y], [computes_float.relu(y)], "second")
    return tvm.IRModule({"first": first["first"], "second": second["second"]})


@pytest.mark.parametrize("target", [t.name for t in all_targets()])
def test_object_files_for_every_target(target: str) -> None:
    spec = get_target(target)
    code = emit.compile_kernels(_two_kernels(spec.word_bits, spec.binary_lanes(64)), spec)
    machine = {"x86_64": 62, "aarch64": 183, "arm": 40}[spec.arch]
    assert code[:4] == b"\x7fELF"
    assert int.from_bytes(code[18:20], "little") == machine
    assert b"__tvm_ffi_first\0" in code and b"__tvm_ffi_second\0" in code


def test_a_kernel_that_no_rule_takes_is_named(caplog: pytest.LogCaptureFixture) -> None:
    x, w = te.placeholder((4, 8), "float32", "x"), te.placeholder((1, 8, 8), "float32", "w")
    doubled = computes_float.dense(x, w, out_channels=8)
    both = computes_float.add(doubled, computes_float.dense(x, w, out_channels=8))
    with caplog.at_level(logging.DEBUG, logger=emit.__name__):
        scheduled = emit.schedule(prim_func([x, w], [both], "two_anchors"), get_target("x86-64-v3"))
    assert emit.unscheduled(scheduled) == ["two_anchors"]
    assert "two_anchors: no schedule rule takes it" in caplog.text
    assert "two_anchors: dense does not apply: 2 stages of role dense" in caplog.text


@I.ir_module
class _Sliced:
    """The tail of a row of packed bytes: of three slices of 4 bytes only the middle one is read."""

    @T.prim_func(s_tir=True)
    def kernel(p: T.Buffer((2112,), "uint8"), u: T.Buffer((6336,), "uint8")):
        T.func_attr({"global_symbol": "kernel", "tirx.noalias": True})
        for n in range(16):
            for i in range(64):
                if i < 12:
                    u[n * 396 + i + 384] = T.if_then_else(
                        i >= 4 and i < 8,
                        p[i // 4 * 2112 + n * 132 + i % 4 - 1984],
                        T.Select(i % 4 < 1, T.uint8(1), T.uint8(0)),
                    )


def test_a_conditional_load_at_a_remainder_reads_where_it_should(target: TargetSpec) -> None:
    """LLVM 22's vectorizer, converting conditions to masks, reads 4 bytes further on; see `TargetSpec.tvm`."""
    p = np.arange(2112).astype("uint8")
    u = aligned(np.zeros(6336, "uint8"))
    tvm.compile(_Sliced, target=tvm.target.Target(target.tvm()))["kernel"](aligned(p), u)
    tails = u.numpy().reshape(16, 396)[:, 384:].reshape(16, 3, 4)
    np.testing.assert_array_equal(tails[:, 1], p.reshape(16, 132)[:, 128:])
    np.testing.assert_array_equal(tails[:, ::2], np.broadcast_to([1, 0, 0, 0], (16, 2, 4)))
