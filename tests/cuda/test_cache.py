"""The compile cache keeps device code, under keys that know its compiler."""

import dataclasses

import pytest
import torch
from torch import nn

import bnncc
from bnncc import cache
from bnncc.layers import QConv2d
from bnncc.runtime.errors import BnnccError
from bnncc.targets.cuda import toolchain
from bnncc.targets.descriptor import get_target
from bnncc.targets.launch import DeviceCode, Launch, Resources

TARGET = get_target("cuda-sm_90")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BNNCC_CACHE", str(tmp_path))
    return tmp_path


def test_entries_hold_device_code():
    model = nn.Sequential(QConv2d(3, 5, 3), QConv2d(5, 4, 1)).eval()
    (version,) = bnncc.compile(model, (torch.ones(1, 3, 6, 6),), options=bnncc.Options(cache=False)).versions
    launches = ((Launch("f", (1, 2, 3), (32, 2, 1), 1024, (0, 3, 1)), Launch("g", (4, 1, 1), (64, 1, 1), 0, (1,))), ())
    resources = {"f": Resources(40, 128, 0, 64), "g": Resources(255, 0, 16, 1024)}
    device = DeviceCode("sm_90", b"\x7fELF\0image", b"// ptx\n", launches, resources)
    made = dataclasses.replace(version, target=TARGET, objects=(), device=device)
    entry = cache.Entry(("one",), (TARGET,))
    entry.store((made,))
    assert entry.load() == (made,)


def key(target="cuda-sm_90"):
    return cache.Entry.of(b"model", [get_target(target)]).keys[0]


def test_keys_know_the_compiler(monkeypatch):
    class Other:
        identity, architectures = "NVRTC 99.0", ("sm_90", "sm_87")

    before, processor, jetson = key(), key("rpi4"), key("jetson-orin")
    assert before == key() and len({before, processor, jetson}) == 3
    monkeypatch.setattr(toolchain, "_compilers", lambda: (Other(),))
    assert key() != before and key("jetson-orin") != jetson
    assert key("rpi4") == processor


def test_without_a_compiler_there_is_no_key(monkeypatch):
    monkeypatch.setattr(toolchain, "_compilers", lambda: ())
    with pytest.raises(BnnccError, match="needs NVRTC or nvcc"):
        key()
