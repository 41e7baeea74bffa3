"""What tests of CUDA share: a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulator.gpu import EmulatedGpu


@pytest.fixture(scope="session")
def emulated_gpu(tmp_path_factory) -> EmulatedGpu:
    """The stand-in for libcuda.so.1; `add` tells it of images, `environment` lets a process find it.

    One for the session, so that modules are compiled once; a process sees the images of all tests.
    """
    return EmulatedGpu(tmp_path_factory.mktemp("emulated-gpu"))


@pytest.fixture(scope="module")
def emulated_compiler(emulated_gpu) -> Iterator[EmulatedGpu]:
    """The emulated GPU, which knows every image that is compiled while the module's tests run."""
    from bnncc.targets.cuda import toolchain

    compile_cuda = toolchain.compile_cuda

    def compile_and_add(source: str, sm: str) -> tuple[bytes, bytes]:
        image, ptx = compile_cuda(source, sm)
        emulated_gpu.add(source, sm, image, ptx)
        return image, ptx

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "compile_cuda", compile_and_add)
        yield emulated_gpu
