"""GPUs: `build` compiles on any machine what is to be measured, `run` measures it on one with a GPU.

    python -m benchmarks.cuda build build/gpu --target cuda-sm_90     # anywhere; needs bnncc[cuda] and bitorch
    python -m benchmarks.cuda run build/gpu                           # there; needs NumPy, and torch for the peers

`run` prints tables and writes a JSON file under benchmarks/results. docs/benchmarks.md says what is measured, and how.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.cuda_device import GpuError, Unavailable
from benchmarks.cuda_folder import FolderError
from bnncc.runtime.errors import BnnccError

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile everything into a folder")
    build.add_argument("folder", type=Path)
    build.add_argument("--target", default="cuda-sm_90", help="as of bnncc targets (default: cuda-sm_90)")
    run = commands.add_parser("run", help="measure what is in the folder on a GPU of this machine")
    run.add_argument("folder", type=Path)
    run.add_argument("--quick", action="store_true", help="a quarter of the time for everything, no torch.compile")
    run.add_argument("--device", type=int, default=0, help="number of the GPU (default: 0)")
    run.add_argument("--name", help="name of the file under benchmarks/results (default: cuda-<the GPU's>)")
    run.add_argument("--results", type=Path, default=RESULTS, help="folder of that file")
    for command in (build, run):
        command.add_argument("--only", action="append", metavar="TEXT", help="items like this: networks/ResnetE18, …")
    options = parser.parse_args(arguments)
    try:
        if options.command == "build":
            try:  # the compiler, which the machine with a GPU need not have
                from benchmarks.cuda_build import Builder
            except ImportError as error:
                raise BnnccError(f"building needs what bnncc[dev] brings: {error}; run does not") from None
            Builder(options.target).build(options.folder, options.only or [""], lambda line: print(line, flush=True))
        else:
            from benchmarks.cuda_run import run as measure

            measure(options.folder, options.results, options.only or [""], options.quick, options.device, options.name)
    except (BnnccError, FolderError, GpuError, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
