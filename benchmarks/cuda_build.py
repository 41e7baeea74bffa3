"""Compiles, on any machine, what tests/gpu and `python -m benchmarks.cuda run` need on one with a GPU.

Items are named as `Builder.items` lists them; each fills its part of the index (`benchmarks.cuda_folder`):

    limits         {"modules": {name: cubin}, "kernels": as `cuda_limits.table`}
    convolutions   shape → {"expected": npz, "batches": {batch: {"artifact", "image": cubin, "first", "steps", "macs"}}}
    networks       name → {"cpu": artifact, "twin": Python, "batches": {batch: artifact}}
    demo           {"artifact", "cpu", "images": npz of images and labels, "accuracy": of eager}
    grid           name → {"artifact", "expected": npz, "shapes": of the inputs, "cases": names}
    others         "older", "newer" → {"artifact", "sm", "expected": npz, "shapes"}
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import cuda_folder, cuda_limits, cuda_twins, models
from benchmarks.cuda_inputs import awkward, image
from benchmarks.zoo import NETWORKS, float_twin
from bnncc.artifact import Artifact
from bnncc.compiler import Options
from bnncc.compiler import compile as compile_model
from bnncc.layers import QConv2d
from bnncc.runtime.errors import BnnccError
from bnncc.targets.cuda import toolchain
from bnncc.targets.cuda.descriptor import ARCHITECTURES, CUDA_TARGETS, CudaSpec

BATCHES = (1, 32, 256)
GRIDS = ("convolutions", "layers")
NETWORKS_BUILT = ("ResnetE18", "QuickNet", "BinaryDenseNet28")

#: What computes the values that a GPU is compared with, on the processor beside it.
_CPU = {"x86_64": "x86-64-v3", "aarch64": "aarch64"}
#: Branches of a module of the grid: what a module costs by itself is small then, and its arena, too.
_MODULE = 40
_SEED = 7

#: A network of one input and one output, with its name and the shape of its input.
Case = tuple[str, nn.Module, tuple[int, ...]]


class Builder:
    """Builds items for one target into a folder. options: of every compilation."""

    def __init__(self, target: str, options: Options | None = None, batches: Sequence[int] = BATCHES) -> None:
        if target not in CUDA_TARGETS:
            raise BnnccError(f"{target!r} is no target with a GPU; these are {', '.join(CUDA_TARGETS)}")
        self.spec: CudaSpec = CUDA_TARGETS[target]
        self.options, self.batches = options or Options(), batches
        self._files = Path()
        self.index: dict[str, Any] = {}

    def items(self) -> dict[str, Callable[[], None]]:
        """Name → what builds it, in order."""
        found: dict[str, Callable[[], None]] = {"limits": self._limits, "demo": self._demo, "others": self._others}
        for kind in GRIDS:
            found[f"grid/{kind}"] = _later(self._grid, kind)
        for shape in models.CONVOLUTIONS:
            found[f"convolutions/{shape}"] = _later(self._convolution, shape)
        for name in NETWORKS_BUILT:
            found[f"networks/{name}"] = _later(self._network, name)
        return found

    def build(self, folder: Path, only: Sequence[str] = ("",), say: Callable[[str], None] = lambda line: None) -> int:
        """Builds the items whose names contain one of the texts; returns the bytes of the folder.

        Raises BnnccError, FolderError.
        """
        items = {name: build for name, build in self.items().items() if any(text in name for text in only)}
        if not items:
            raise BnnccError(f"no item is named like {' or '.join(only)}: they are {', '.join(self.items())}")
        torch.set_num_threads(1)  # sums in one order, so that what is built is the same every time
        with tempfile.TemporaryDirectory(prefix="bnncc-gpu-") as name:
            self._files = Path(name)
            self.index = {
                "format": cuda_folder.FORMAT,
                "target": self.spec.name,
                "sm": self.spec.sm,
                "versions": {
                    **{package: version(package) for package in ("bnncc", "apache-tvm", "torch", "numpy")},
                    "compiler": toolchain.compiler(self.spec.sm).identity,
                },
            }
            for item, build in items.items():
                start = time.perf_counter()
                build()
                say(f"{item}: {time.perf_counter() - start:.1f} s")
            text = json.dumps(self.index, indent=1, ensure_ascii=False)
            (self._files / cuda_folder.INDEX).write_text(text + "\n", encoding="utf-8")
            size = cuda_folder.pack(self._files, folder)
            unpacked = sum(path.stat().st_size for path in self._files.iterdir())
            say(f"{folder / cuda_folder.BUNDLE}: {1e-6 * size:.1f} MB, unpacked {1e-6 * unpacked:.1f} MB")
        return size

    # -- items -------------------------------------------------------------------------------------------------------

    def _limits(self) -> None:
        modules = {}
        for name, (sm, source) in cuda_limits.sources(self.spec.sm).items():
            cubin, _ = toolchain.compile_cuda(source, sm)
            modules[name] = f"{name}.cubin"
            (self._files / modules[name]).write_bytes(cubin)
        self.index["limits"] = {"modules": modules, "kernels": cuda_limits.table(self.spec.sm)}

    def _convolution(self, shape: str) -> None:
        size, channels = models.CONVOLUTIONS[shape]
        model, _ = models.between_binary_layers(size, channels, 3)
        one = image((1, channels, size, size), _SEED)
        with torch.no_grad():
            sums = model(torch.from_numpy(one)).numpy()
        stem = f"conv-{size}-{channels}"
        entry: dict[str, Any] = {"expected": self._save(stem, [sums.astype(np.int16)]), "batches": {}}
        if not np.array_equal(sums.astype(np.int16), sums):
            raise ValueError(f"{shape}: the sums are no small integers")
        for batch in self.batches:
            artifact = self._compile(model, torch.empty(batch, channels, size, size), f"conv_{size}_{channels}_{batch}")
            code = artifact.versions[0].device
            if code is None:
                raise ValueError("no device code")
            (self._files / f"{stem}-{batch}.cubin").write_bytes(code.image)
            steps = artifact.manifest["versions"][0]["steps"]
            first, second = [i for i, step in enumerate(steps) if "conv2d" in step["op"]]
            entry["batches"][str(batch)] = {
                "artifact": self._artifact(artifact, f"{stem}-{batch}"),
                "image": f"{stem}-{batch}.cubin",
                "first": first,
                "steps": second - first,
                "macs": batch * size**2 * 9 * channels**2,
            }
        self.index.setdefault("convolutions", {})[shape] = entry

    def _network(self, name: str) -> None:
        model, example = NETWORKS[name].build()
        entry: dict[str, Any] = {"cpu": self._cpu(model, example, name), "twin": f"{name}.py", "batches": {}}
        for batch in self.batches:
            inputs = example.new_empty(batch, *example.shape[1:])
            entry["batches"][str(batch)] = self._artifact(self._compile(model, inputs, name), f"{name}-{batch}")
        twin = cuda_twins.source_of(float_twin(NETWORKS[name].build()[0]), name)  # which takes the network apart
        (self._files / entry["twin"]).write_text(twin, encoding="utf-8")
        self.index.setdefault("networks", {})[name] = entry

    def _demo(self) -> None:
        model, images, labels = demo_model()
        with torch.no_grad():
            right = int((model(images).argmax(1) == labels).sum())
        self.index["demo"] = {
            "artifact": self._artifact(self._compile(model, images[:1], "digits"), "digits"),
            "cpu": self._cpu(model, images[:1], "digits"),
            "images": self._save("digits-images", [images.numpy(), labels.numpy()]),
            "right": right,
        }

    def _grid(self, kind: str) -> None:
        for name, cases in grid(kind).items():
            self.index.setdefault("grid", {})[name] = self._cases(f"grid-{name}", cases, self.spec)

    def _others(self) -> None:
        """A small network for an architecture before this one, which the driver compiles anew, and for one after."""
        numbers = sorted(int(sm.removeprefix("sm_")) for sm in ARCHITECTURES)
        own = int(self.spec.sm.removeprefix("sm_"))
        entry = {}
        for which, choice in (("older", [n for n in numbers if n < own]), ("newer", [n for n in numbers if n > own])):
            if choice:
                suffix = "-aarch64" if self.spec.arch == "aarch64" else ""
                name = f"cuda-sm_{choice[0] if which == 'older' else choice[-1]}"
                spec = CUDA_TARGETS.get(f"{name}{suffix}", CUDA_TARGETS[name])
                if spec.arch == self.spec.arch:
                    entry[which] = {**self._cases(f"sm-{which}", [small_case()], spec), "sm": spec.sm}
        self.index["others"] = entry

    # -- files -------------------------------------------------------------------------------------------------------

    def _cases(self, stem: str, cases: Sequence[Case], spec: CudaSpec) -> dict[str, Any]:
        """Networks of one input and one output as one artifact, and what eager computes of inputs that `awkward`
        makes, of each the number as its seed."""
        modules, shapes = [module for _, module, _ in cases], [shape for *_, shape in cases]
        model = _Branches(modules).eval()
        inputs = [torch.from_numpy(awkward(shape, seed)) for seed, shape in enumerate(shapes)]
        with torch.no_grad():
            expected = [output.numpy() for output in model(*inputs)]
        artifact = self._compile(model, inputs, "branches", spec)
        return {
            "artifact": self._artifact(artifact, stem),
            "expected": self._save(stem, expected),
            "shapes": [list(shape) for shape in shapes],
            "cases": [name for name, *_ in cases],
        }

    def _compile(self, model: nn.Module, inputs: Any, name: str, spec: CudaSpec | None = None) -> Artifact:
        given = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
        return compile_model(model, given, spec or self.spec, name=name, options=self.options)

    def _cpu(self, model: nn.Module, example: torch.Tensor, name: str) -> str:
        artifact = compile_model(model, (example,), _CPU[self.spec.arch], name=name, options=self.options)
        return self._artifact(artifact, f"{name}-cpu")

    def _artifact(self, artifact: Artifact, stem: str) -> str:
        artifact.save(self._files / f"{stem}.so")
        return f"{stem}.so"

    def _save(self, stem: str, arrays: Iterable[np.ndarray]) -> str:
        # Without compression, which the bundle has; and so without a clock's time in it.
        np.savez(self._files / f"{stem}.npz", *arrays)
        return f"{stem}.npz"


def demo_model() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The network of examples/digits.py, trained; the held-out images, and their labels."""
    path = Path(__file__).parents[1] / "examples" / "digits.py"  # others have a package of that name
    spec = importlib.util.spec_from_file_location("digits", path)
    if spec is None or spec.loader is None:
        raise BnnccError(f"{path} is missing: build from a checkout")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    training, test = digits.load_images()
    return digits.train(*training, lambda stage, done, total: None), *test


class _Branches(nn.Module):
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(branch(x) for branch, x in zip(self.branches, inputs, strict=True))


def small_case() -> Case:
    torch.manual_seed(_SEED)
    layers = QConv2d(64, 96, 3, padding=1), nn.BatchNorm2d(96), QConv2d(96, 32, 3, padding=1, stride=2)
    return "two binary convolutions", nn.Sequential(*layers).eval(), (2, 64, 9, 10)


def _later(build: Callable[[str], None], name: str) -> Callable[[], None]:
    return lambda: build(name)


# -- the exactness grid, which the tests of processors hold ----------------------------------------------------------


def _conformance() -> tuple[Any, Any, Any, Any]:
    """Its modules, which are no package: tests are not installed."""
    tests = str(Path(__file__).parents[1] / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    from conformance import branches, points, test_grid, test_layers  # type: ignore[import-not-found]

    return branches, points, test_grid, test_layers


def grid(kind: str) -> dict[str, list[Case]]:
    """Name → the cases of a module: pairwise designs. kind: of `GRIDS`."""
    branches, points, of_points, of_layers = _conformance()
    if kind == "layers":
        grids = of_layers.GRIDS
    else:
        grids = {name: [of_points.case(p) for p in points.pairwise(axes)] for name, axes in points.GRIDS.items()}
    found = {}
    for name, cases in grids.items():
        for i, part in enumerate(branches.chunks(cases, _MODULE)):
            found[f"{name.replace(' ', '-')}-{i}"] = [(c.name, c.module, tuple(c.input.shape)) for c in part]
    return found


__all__ = ["BATCHES", "NETWORKS_BUILT", "Builder", "grid"]
