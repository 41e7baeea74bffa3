"""The benchmarks of GPUs, without one: what is built, what is measured on an emulated GPU, what is claimed of it."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from emulator.gpu import EmulatedGpu
from torch import nn

from benchmarks import cuda, cuda_build, cuda_claims, cuda_device, cuda_folder, cuda_limits, cuda_peers, cuda_twins, zoo
from benchmarks.cuda_inputs import awkward, image
from bnncc.compiler import Options
from bnncc.layers import QConv2d, QLinear
from bnncc.targets.cuda import toolchain

ROOT = Path(__file__).parents[2]

# -- what travels ------------------------------------------------------------------------------------------------------


def test_inputs_are_the_same_everywhere():
    """The numbers themselves, so that another NumPy that makes others is noticed."""
    assert (image((3,), 0) * 2**22).tolist() == [2297835, -3862339, -7701187]
    x = awkward((64, 64), 1)
    assert np.isnan(x).any() and np.isinf(x).any() and (np.signbit(x) & (x == 0)).any()
    assert np.array_equal(x, awkward((64, 64), 1), equal_nan=True)


def test_a_twin_computes_what_the_traced_network_does():
    model, x = zoo.NETWORKS["ResnetE18"].build()
    traced = zoo.float_twin(model)
    module = {}
    exec(cuda_twins.source_of(traced, "ResnetE18"), module)
    twin = module["Twin"]().eval()
    twin.load_state_dict(dict(zip(twin.state_dict(), traced.state_dict().values(), strict=True)))
    with torch.no_grad():
        assert torch.equal(twin(x), traced(x))


def test_a_twin_of_layers_that_nobody_wrote_down():
    with pytest.raises(ValueError, match="has a Softsign"):
        cuda_twins.source_of(torch.fx.symbolic_trace(nn.Sequential(nn.Softsign())), "x")


def test_a_folder_without_a_bundle(tmp_path):
    with pytest.raises(cuda_folder.FolderError, match="has no bundle"), cuda_folder.opened(tmp_path):
        pass


def test_a_bundle_that_is_cut_off(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / cuda_folder.INDEX).write_text(json.dumps({"format": cuda_folder.FORMAT}))
    (files / "noise").write_bytes(os.urandom(100_000))
    cuda_folder.pack(files, tmp_path)
    bundle = tmp_path / cuda_folder.BUNDLE
    bundle.write_bytes(bundle.read_bytes()[:-50_000])
    with pytest.raises(cuda_folder.FolderError, match="cannot be read"), cuda_folder.opened(tmp_path):
        pass


def test_a_folder_of_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_folder, "MOST_BYTES", 1000)
    files = tmp_path / "files"
    files.mkdir()
    (files / "noise").write_bytes(os.urandom(2000))
    with pytest.raises(cuda_folder.FolderError, match="more than 1000: build less with --only"):
        cuda_folder.pack(files, tmp_path)
    assert not (tmp_path / cuda_folder.BUNDLE).exists()


# -- claims ------------------------------------------------------------------------------------------------------------


def _report():
    """Every claim holds, by little."""
    row = {"median_ms": {"bnncc": 1.0, "torch fp16": 3.1}, "times_faster": {"torch fp16": 3.1}, "missing": {}}
    shapes = ("56²×64", "28²×128", "14²×256", "7²×512")
    network = {**row, "times_faster": {"torch fp16": 2.1}}
    report = {
        "convolutions": {shape: {"256": {**row, "tops": 1.0, "share_of_limit": 0.61}} for shape in shapes},
        "networks": {"ResnetE18": {"256": network, "1": {**network, "latency": network}}},
    }
    return json.loads(json.dumps(report))  # nothing of it twice


def test_every_line_of_the_demands_is_a_claim():
    found = cuda_claims.claims(_report())
    assert len(found) == 3 + 4 + 1 + 1 and {claim.verdict for claim in found} == {"holds"}
    assert all(claim.ratio > 1 for claim in found)


@pytest.mark.parametrize(
    ("place", "value", "item"),
    [
        (("convolutions", "7²×512", "256", "share_of_limit"), 0.59, "3×3, 7²×512, batch 256"),
        (("convolutions", "56²×64", "256", "times_faster", "torch fp16"), 2.9, "3×3, 56²×64, batch 256"),
        (("networks", "ResnetE18", "256", "times_faster", "torch fp16"), 1.9, "ResnetE18, batch 256"),
        (("networks", "ResnetE18", "1", "latency", "times_faster", "torch fp16"), 1.9, "ResnetE18, batch 1"),
    ],
)
def test_a_figure_below_its_demand_fails(place, value, item):
    report = _report()
    *path, last = place
    target = report
    for key in path:
        target = target[key]
    target[last] = value
    failed = [claim for claim in cuda_claims.claims(report) if claim.verdict == "FAILS"]
    assert [claim.item for claim in failed] == [item] and failed[0].ratio < 1


def test_the_share_of_the_first_shape_is_no_claim():
    report = _report()
    report["convolutions"]["56²×64"]["256"]["share_of_limit"] = 0.1
    assert all(claim.verdict == "holds" for claim in cuda_claims.claims(report))


def test_what_was_not_measured_says_why():
    report = _report()
    peerless = report["convolutions"]["7²×512"]["256"]
    del peerless["times_faster"]["torch fp16"]
    peerless["missing"]["torch fp16"] = "torch is not installed"
    del report["networks"]["ResnetE18"]["256"]
    found = {(c.item, c.what): c for c in cuda_claims.claims(report) if c.verdict == "not measured"}
    assert [claim.why for claim in found.values()] == ["torch is not installed", "the item was not run"]
    assert "not measured: torch is not installed" in cuda_claims.claims_table(list(found.values()))


# -- building and measuring, on an emulated GPU ----------------------------------------------------------------------


class _Small(nn.Sequential):
    """A float stem, two binary convolutions, signs of a reshape, a dense layer: what the networks are made of."""

    def __init__(self):
        torch.manual_seed(0)
        norms = [nn.BatchNorm2d(16) for _ in range(3)]
        for norm in norms:
            nn.init.normal_(norm.weight)
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), norms[0],
            QConv2d(16, 16, 3, padding=1), norms[1], QConv2d(16, 16, 3, padding=1), norms[2],
            nn.Flatten(), QLinear(16 * 4 * 4, 16), nn.Linear(16, 10),
        )  # fmt: skip


def _tiny(patch):
    """Everything that is built, by a few small ones under the same names, so that tests/gpu find them."""
    patch.setattr(cuda_build.models, "CONVOLUTIONS", {"7²×512": (5, 32)})
    built = zoo.Network(lambda: (_Small().eval(), torch.zeros(1, 3, 8, 8)), None)
    patch.setattr(cuda_build, "NETWORKS", {"QuickNet": built})
    patch.setattr(cuda_build, "NETWORKS_BUILT", ("QuickNet",))
    name, module, shape = cuda_build.small_case()
    cases = [(name, module.train(), shape)]  # what is built sees to evaluation mode itself
    patch.setattr(cuda_build, "GRIDS", ("layers",))
    patch.setattr(cuda_build, "grid", lambda kind: {f"{kind}-0": cases})
    patch.setattr(cuda_build, "float_twin", lambda model: torch.fx.symbolic_trace(_plain(model)))
    images = torch.from_numpy(image((3, 3, 8, 8), 3))
    patch.setattr(cuda_build, "demo_model", lambda: (_Small().eval(), images, torch.arange(3)))
    patch.setattr(cuda_limits, "ROUNDS", 2)
    patch.setattr(cuda_limits, "_WITH_WGMMA", ())  # which the emulator does not know


def _plain(model):
    plain = {QConv2d: nn.Conv2d(16, 16, 3, padding=1, bias=False), QLinear: nn.Linear(16 * 4 * 4, 16, bias=False)}
    return nn.Sequential(*(plain.get(type(layer), layer) for layer in model)).eval()


#: Of the same source the same bytes, which NVRTC itself does not always make (`toolchain.compile_cuda`).
_compiled = functools.cache(toolchain.compile_cuda)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as `build` writes it, and the emulated GPU that knows its kernels."""
    gpu = EmulatedGpu(tmp_path_factory.mktemp("emulated"))

    def compile_and_add(source, sm):
        built = _compiled(source, sm)
        if sm != "sm_120":  # which the emulated GPU refuses to run
            gpu.add(source, sm, *built)
        return built

    path = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        _tiny(patch)
        patch.setattr(toolchain, "compile_cuda", compile_and_add)
        size = cuda_build.Builder("cuda-sm_90", Options(cache=False), batches=(1, 32)).build(path)
    assert size == (path / cuda_folder.BUNDLE).stat().st_size
    return path, gpu


def test_what_is_built(folder):
    with cuda_folder.opened(folder[0]) as (files, index):
        assert {"limits", "convolutions", "networks", "demo", "grid", "others"} <= index.keys()
        named = set(_files(index))
        assert named <= {path.name for path in files.iterdir()}
        assert {path.name for path in files.iterdir()} - named == {cuda_folder.INDEX}
        assert index["convolutions"]["7²×512"]["batches"]["32"]["macs"] == 32 * 25 * 9 * 32**2
        assert index["others"]["older"]["sm"] == "sm_75" and index["others"]["newer"]["sm"] == "sm_120"


def _files(entry):
    """Every string of the index that names a file."""
    for value in entry.values() if isinstance(entry, dict) else entry:
        if isinstance(value, dict | list):
            yield from _files(value)
        elif isinstance(value, str) and value.endswith((".so", ".npz", ".cubin", ".py")):
            yield value


def test_building_again_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    """Of a part, every file, where equal CUDA C becomes equal machine code; and of equal files, the bundle."""
    _tiny(monkeypatch)
    monkeypatch.setattr(toolchain, "compile_cuda", _compiled)
    cuda_build.Builder("cuda-sm_90", Options(cache=False), batches=(32,)).build(tmp_path, ["limits", "networks"])
    with cuda_folder.opened(tmp_path) as (files, _), cuda_folder.opened(folder[0]) as (before, _):
        names = sorted({path.name for path in files.iterdir()} - {cuda_folder.INDEX})
        assert names == ["QuickNet-32.so", "QuickNet-cpu.so", "QuickNet.py", "limits.cubin"]
        assert all((files / name).read_bytes() == (before / name).read_bytes() for name in names)
        cuda_folder.pack(files, tmp_path / "again")
    assert (tmp_path / "again" / cuda_folder.BUNDLE).read_bytes() == (tmp_path / cuda_folder.BUNDLE).read_bytes()


#: As on a machine that has NumPy and pytest alone.
_BARE = """
import sys
for name in ("torch", "tvm", "bitorch", "rich", "click", "matplotlib", "onnx", "ziglang", "sklearn"):
    sys.modules[name] = None
"""

#: Small amounts: an emulated GPU takes a second for what a GPU does in a microsecond.
_LITTLE = """
from benchmarks import cuda, cuda_device, cuda_measure, cuda_run
cuda_device.BURST, cuda_measure.REPEATS, cuda_measure._CALLS, cuda_measure._FEWEST_CALLS = 1e-3, 2, 2, 2
cuda_run._MEMORY = 1 << 17
"""

#: A torch that copies a few bytes instead.
_PEERS = """
import ctypes
class Peers:
    version = "made up"
    def __init__(self, gpu):
        self.gpu, self.memory = gpu, gpu.allocate(64)
    def copy(self, stream):
        address = ctypes.c_uint64(self.memory.address)
        self.gpu.call("cuMemcpyAsync", address, address, ctypes.c_size_t(32), ctypes.c_void_p(stream))
    def convolution(self, kind, size, channels, batch, repeats):
        if kind == "torch fp32":
            raise RuntimeError("no algorithm\\nfor it")
        return self.copy
    def network(self, kind, source, shape):
        assert "class Twin" in source.read_text()
        return self.copy, self.copy
    def forget(self):
        pass
cuda_run.Torch = Peers
"""

_MAIN = "sys.exit(cuda.main(sys.argv[1:]))"


def _python(program, arguments, gpu, **properties):
    environment = {**os.environ, **gpu.environment(**properties), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_run(folder, tmp_path):
    """With NumPy alone. What it would be compared with is missing, with the reason, in the claims, too."""
    path, gpu = folder
    arguments = ["run", str(path), "--results", str(tmp_path), "--name", "x", "--quick"]
    done = _python(_BARE + _LITTLE + _MAIN, arguments, gpu)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["gpu"]["name"] == "Emulated GPU" and report["gpu"]["capability"] == "9.0"
    assert report["without_torch"].startswith("torch is not installed") and "missing" in report["before"]
    assert {"b1 and", "b1 xor", "s8", "f16", "fma", "popc", "memory read", "memory copied"} <= report["limits"].keys()
    row = report["convolutions"]["7²×512"]["32"]
    assert row["tops"] > 0 and row["limit_by"] in cuda_limits.BINARY and row["share_of_limit"] > 0
    assert row["missing"].keys() == {"torch fp16", "torch fp32"}
    small = report["networks"]["QuickNet"]
    assert small["1"]["latency"]["median_ms"]["bnncc"] > 0 and "latency" not in small["32"]
    assert small["32"]["host_to_host"]["median_ms"]["bnncc"] > 0 and small["32"]["launches"] > 3
    assert {claim["verdict"] for claim in report["claims"]} == {"not measured"}
    for words in (
        "what the GPU does at best",
        "convolutions between",
        "float twins",
        "what was demanded",
        "without plots",
    ):
        assert words in done.stdout


def test_run_beside_peers(folder, tmp_path):
    path, gpu = folder
    arguments = ["run", str(path), "--results", str(tmp_path), "--name", "x", "--only", "32"]
    done = _python("import sys\n" + _LITTLE + _PEERS + _MAIN, arguments, gpu)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    row, small = report["convolutions"]["7²×512"]["32"], report["networks"]["QuickNet"]["32"]
    assert report["versions"]["torch"] == "made up" and report["without_torch"] == ""
    assert row["times_faster"].keys() == {"torch fp16"} and row["missing"] == {
        "torch fp32": "RuntimeError: no algorithm"
    }
    assert small["times_faster"].keys() == set(cuda_peers.KINDS) == small["host_to_host"]["times_faster"].keys()
    assert "1" not in report["networks"]["QuickNet"]
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "x-convolutions.svg", "x-networks.svg"}


def test_gpu_tests_pass_on_the_emulated_gpu(folder):
    """tests/gpu themselves, with NumPy and pytest alone: none fails; what skips says what was not built or is not
    there."""
    path, gpu = folder
    arguments = ["tests/gpu", "--artifacts", str(path), "-q", "-s", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist"]
    program = _BARE + "import pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    done = _python(program, arguments, gpu, memory=1 << 25)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "0 mismatches in 1 layers" in done.stdout and " exact steps differ" in done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    allowed = ("was not built: leave out --only", "could not import 'torch'", "there is one GPU")
    assert skipped and all(any(reason in line for reason in allowed) for line in skipped), skipped


# -- torch, as far as it goes on a CPU ---------------------------------------------------------------------------------


@pytest.fixture
def torch_on_the_cpu(monkeypatch):
    """torch's CUDA functions replaced: tensors stay on the CPU, a graph counts its replays."""
    replays = []

    class Graph:
        def replay(self):
            replays.append(self)

    cpu = torch.device("cpu")
    for name, value in {
        "is_available": lambda: True, "set_device": lambda device: None, "CUDAGraph": Graph,
        "ExternalStream": lambda handle, device: types.SimpleNamespace(synchronize=lambda: None),
        "set_stream": lambda stream: None, "graph": lambda graph: contextlib.nullcontext(),
        "empty_cache": lambda: None, "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "device", lambda *place: cpu)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with torch.no_grad():  # which `Torch` leaves switched off
        yield cuda_peers.Torch(types.SimpleNamespace(index=0, stream=0)), replays
    torch.set_grad_enabled(True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def test_peers_capture_their_twin(torch_on_the_cpu, tmp_path):
    peers, replays = torch_on_the_cpu
    source = tmp_path / "twin.py"
    source.write_text(cuda_twins.source_of(torch.fx.symbolic_trace(_plain(_Small())), "Small"))
    run, from_host = peers.network("torch fp16", source, (2, 3, 8, 8))
    model, x, result, graph = run.holds
    assert x.dtype == result.dtype == torch.float16 and result.shape == (2, 10)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert all(weight.dtype == torch.float16 for weight in model.parameters())
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    run(0)
    from_host(0)
    assert replays == [graph, graph]


def test_peers_capture_as_many_convolutions(torch_on_the_cpu, monkeypatch):
    peers, replays = torch_on_the_cpu
    calls, conv2d = [], torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *given: (calls.append(1), conv2d(*given))[1])
    run = peers.convolution("torch fp32", 6, 8, 2, 5)
    assert len(calls) == 3 + 5  # warming up, and the graph's
    assert run.holds[1].shape == (2, 8, 6, 6) and run.holds[1].dtype == torch.float32
    run(0)
    assert len(replays) == 1


def test_a_torch_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU")
    with pytest.raises(cuda_device.Unavailable, match="sees no GPU"):
        cuda_peers.Torch(types.SimpleNamespace(index=0, stream=0))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_run_without_a_gpu(tmp_path, capsys):
    if cuda_device.missing() is None:
        pytest.skip("there is a GPU")
    assert cuda.main(["run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no GPU: libcuda.so.1 cannot be opened") and error.count("\n") == 1


def test_items_that_nobody_has(tmp_path, capsys):
    assert cuda.main(["build", str(tmp_path), "--only", "nothing"]) == 2
    assert "no item is named like nothing: they are limits, demo, " in capsys.readouterr().err


def test_a_target_without_a_gpu(tmp_path, capsys):
    assert cuda.main(["build", str(tmp_path), "--target", "rpi4"]) == 2
    assert "'rpi4' is no target with a GPU" in capsys.readouterr().err
