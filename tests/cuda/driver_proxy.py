"""Builds driver_proxy.c, with a function for each of cuda_abi.h's that passes its arguments on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bnncc import runtime

_HERE = Path(__file__).parent
_SOURCES = Path(next(iter(runtime.__path__))) / "c"

# Waiting is over when it fails: what was waited for is finished, or nothing is running any more.
_FUNCTION = """
EXPORT CUresult {name}({parameters}) {{
  int code = arrive("{name}");
  if (code && !{waits}) return code;
  int result = behind.{name}({arguments});
  return code ? code : leave("{name}", result);
}}
"""


def functions() -> list[tuple[str, str]]:
    """Name and parameters of every function that the driver of an artifact calls."""
    text = re.sub(r"[\s\\]+", " ", (_SOURCES / "cuda_abi.h").read_text())
    return re.findall(r"\bF\((cu\w+), \(([^()]*)\)\)", text)


def build_proxy(folder: Path) -> None:
    """Writes libcuda.so.1 into the folder."""
    source = [(_HERE / "driver_proxy.c").read_text()]
    for name, parameters in functions():
        arguments = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters))
        waits = int(name.endswith("Synchronize"))
        source.append(_FUNCTION.format(name=name, parameters=parameters, arguments=arguments, waits=waits))
    (folder / "proxy.c").write_text("".join(source))
    build_library(folder, folder / "proxy.c", "-ldl", "-lpthread")


def build_library(folder: Path, *arguments: Path | str) -> None:
    """A libcuda.so.1 from C sources; arguments: these, and options of the linker."""
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu.2.28", "-std=gnu11", "-O1", "-g0"]
    command += ["-Wall", "-Wextra", "-Werror", "-fno-sanitize=undefined", "-fvisibility=hidden", "-shared", "-fPIC"]
    command += [f"-I{_SOURCES}", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
