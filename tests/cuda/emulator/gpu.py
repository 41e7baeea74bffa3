"""A libcuda.so.1 that is found where there is no GPU, and the table of what its images stand for."""

from __future__ import annotations

import os
from pathlib import Path

from bnncc import runtime

from . import EmulatedModule, emulate
from .build import compile_host

_HERE = Path(__file__).parent
_DRIVER = ("driver.cpp", "driver_images.cpp", "driver_memory.cpp", "driver_streams.cpp")


class EmulatedGpu:
    """Images, and the environment in which a process finds them on an emulated GPU.

    gpu.add(source, "sm_90", cubin, ptx)
    subprocess.run([…], env={**os.environ, **gpu.environment(capability=86, memory=1000000)})
    gpu.report()["frees"]
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table: list[str] = []
        self._modules: list[EmulatedModule] = []
        self.library = folder / "libcuda.so.1"
        c_driver = Path(next(iter(runtime.__path__))) / "c"
        options = [f"-I{c_driver}", "-Wl,-soname,libcuda.so.1", "-lpthread"]
        compile_host([_HERE / name for name in _DRIVER], self.library, options)

    def add(self, source: str, sm: str, image: bytes, ptx: bytes = b"") -> EmulatedModule:
        """Lets the images, a cubin and its PTX, stand for the source's kernels."""
        # Contraction as nvcc has it where nobody says otherwise, and as NVRTC is told to.
        module = emulate(source, sm, contract=True)
        self._modules.append(module)
        number = sm.removeprefix("sm_").rstrip("af")
        for kind, content in (("cubin", image), ("ptx", ptx)):
            if content:
                path = self._folder / f"{len(self._table)}.{kind}"
                path.write_bytes(content)
                self._table.append(f"{kind} {number} {path} {module.library}\n")
        (self._folder / "table").write_text("".join(self._table))
        return module

    def environment(self, **properties: int) -> dict[str, str]:
        """The variables to set. properties: devices, driver (13000), capability (90), memory (bytes), ptx (0: too new
        for the driver), fail_launch (the number, from 1, of the launch that fails), checks (of the emulator).
        """
        others = os.environ.get("LD_LIBRARY_PATH")
        return {
            "LD_LIBRARY_PATH": f"{self._folder}:{others}" if others else str(self._folder),
            "BNNCC_EMULATED": str(self._folder / "table"),
            "BNNCC_EMULATED_REPORT": str(self._folder / "report"),
            "BNNCC_EMULATED_GPU": " ".join(f"{name}={value}" for name, value in properties.items()),
        }

    def report(self) -> dict[str, int]:
        """What the last process did: allocations, frees, live_bytes, most_bytes, launches, graph_launches, copies."""
        lines = (self._folder / "report").read_text().splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines)}
