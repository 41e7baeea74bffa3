"""The benchmarks of GPUs, without one: what is built, what is measured on an emulated GPU, what is claimed of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emulator import emulate
from emulator.gpu import EmulatedGpu
from torch import nn

from benchmarks import cuda, cuda_build, cuda_claims, cuda_device, cuda_folder, cuda_limits, cuda_twins, zoo
from benchmarks.cuda_inputs import awkward, image
from bnncc.compiler import Options
from bnncc.layers import QConv2d
from bnncc.targets.cuda import toolchain
from bnncc.targets.cuda.cubin import resources
from bnncc.targets.cuda.descriptor import ARCHITECTURES

ROOT = Path(__file__).parents[2]

# -- kernels of the limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_limits_compile_and_hold_their_instructions(sm):
    """The PTX of a loop has one instruction for each chain and nothing that reads memory; nothing spills."""
    rows = cuda_limits.limits(sm)
    for module, (arch, source) in cuda_limits.sources(sm).items():
        image, ptx = toolchain.compile_cuda(source, arch)
        found = resources(image)
        bodies = {part.split("(")[0]: part for part in ptx.decode().split(".entry ")[1:]}
        for name, row in rows.items():
            if row.module != module:
                continue
            assert found[row.function].local_bytes == 0 and found[row.function].registers <= 128
            if not row.operations:
                continue
            kind = name.split(",")[0]
            loop = _loop(bodies[row.function])
            words = {"popc": "popc.b32", "fma": "fma.rn.f32", "s8": ".s8.s8.", "f16": ".f16.f16."}
            word = words.get(kind, f".b1.b1.{'s32.' if module == 'limits' else ''}{kind.split()[-1]}.popc")
            count = 4 * cuda_limits.CHAINS if kind in ("popc", "fma") else cuda_limits.CHAINS
            assert sum(word in line for line in loop) == count, (name, loop[:5])
            assert not any(line.split()[0].startswith(("ld.", "st.")) for line in loop if line)


def _loop(body):
    """The lines of PTX between the label that is jumped back to and the jump."""
    lines = [line.strip() for line in body.splitlines() if line.strip() and not line.strip().startswith("//")]
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith("$L") and line.endswith(":")}
    back = [
        (labels[target], i)
        for i, line in enumerate(lines)
        if line.startswith("@") and (target := line.split()[-1].rstrip(";")) in labels and labels[target] < i
    ]
    begin, end = max(back, key=lambda pair: sum("mma" in line for line in lines[slice(*pair)]))
    return lines[begin + 1 : end]


_ROUNDS = 3


@pytest.mark.parametrize("sm", ["sm_75", "sm_90"])
def test_limits_compute_what_their_instructions_say(sm):
    """Fragments of equal words, so that every element of a product is the same, wherever it lies."""
    rows, (_, source) = cuda_limits.limits(sm, _ROUNDS), cuda_limits.sources(sm, _ROUNDS)["limits"]
    module, rng = emulate(source, sm), np.random.default_rng(0)
    shapes = {
        "sm_75": {"b1 xor": 128, "s8": 16, "f16": 8},
        "sm_90": {"b1 and": 256, "b1 xor": 256, "s8": 32, "f16": 16},
    }
    for name, depth in shapes[sm].items():
        a, b = _equal_words(name, rng)
        got = _run(module, rows[name], a, b)
        written = got.reshape(-1, 4)[:, : 2 if sm == "sm_75" and name != "f16" else 4]
        if name.startswith("b1"):
            bits = (a & b if name == "b1 and" else a ^ b).bit_count()
            assert (written == _ROUNDS * depth // 32 * bits).all(), name
        elif name == "s8":
            products = np.frombuffer(a.to_bytes(4, "little"), np.int8).astype(int) * np.frombuffer(
                b.to_bytes(4, "little"), np.int8
            )
            assert (written == _ROUNDS * depth // 4 * products.sum()).all()
        else:
            pairs = (np.frombuffer(word.to_bytes(4, "little"), np.float16).astype(np.float64) for word in (a, b))
            assert (written == _ROUNDS * depth // 2 * np.multiply(*pairs).sum()).all()


def test_scalar_limits_compute_what_they_say():
    rows, (_, source) = cuda_limits.limits("sm_90", _ROUNDS), cuda_limits.sources("sm_90", _ROUNDS)["limits"]
    module = emulate(source, "sm_90")
    a, b = np.float32(1.5).view(np.uint32), np.float32(0.25).view(np.uint32)
    assert (_run(module, rows["fma"], int(a), int(b)) == 0.25 * (1 + 1.5 + 1.5**2)).all()
    counted = 0
    for _ in range(_ROUNDS):
        counted += (counted ^ 0x12345678).bit_count()
    assert (_run(module, rows["popc"], 0x12345678, 0) == counted).all()


def test_memory_limits_move_what_they_say():
    rows, (_, source) = cuda_limits.limits("sm_90", _ROUNDS), cuda_limits.sources("sm_90", _ROUNDS)["limits"]
    module, rng = emulate(source, "sm_90"), np.random.default_rng(0)
    copy, read = rows["memory copied"], rows["memory read"]
    data = rng.integers(0, 1 << 32, 2 * 256 * copy.inputs, np.uint32)
    out = np.zeros(2 * 256 * copy.outputs, np.uint32)
    module.launch(copy.function, (2,), (256,), 0, data, out)
    assert np.array_equal(out, data) and copy.moved == 4 * (copy.inputs + copy.outputs)
    module.launch(read.function, (2,), (256,), 0, data, np.zeros(512, np.uint32))
    assert read.moved == 4 * read.inputs


def _equal_words(name, rng):
    """A word of A and one of B; of halves, such that sums of few of them are exact in float32."""
    if name == "f16":
        return tuple(int(w) for w in (rng.integers(-8, 8, (2, 2)) / 4).astype(np.float16).view(np.uint32).ravel())
    return tuple(int(w) for w in rng.integers(1, 1 << 32, 2, np.uint64))


def _run(module, row, a, b):
    operands = np.array([a] * 4 + [b] * 4, np.uint32)
    floats = row.function in ("limit_f16", "limit_fma")
    out = np.zeros(32 * row.outputs, np.float32 if floats else np.int32)
    module.launch(row.function, (1,), (32,), 0, np.tile(operands, 32), out)
    return out


def test_operations_of_a_launch():
    """Of a thread, as of its warp: M × N × K multiply-accumulates, two operations each, chains times rounds."""
    assert cuda_limits.limits("sm_90", 10)["b1 and"].operations * 32 == 2 * 16 * 8 * 256 * cuda_limits.CHAINS * 10
    assert cuda_limits.limits("sm_75", 10)["s8"].operations * 32 == 2 * 8 * 8 * 16 * cuda_limits.CHAINS * 10


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


def test_a_folder_without_a_bundle(tmp_path, capsys):
    assert cuda.main(["run", str(tmp_path)]) == 2 if cuda_device.missing() is None else True
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
    """A float stem, two binary convolutions, a dense layer: what the networks are made of."""

    def __init__(self):
        torch.manual_seed(0)
        norms = [nn.BatchNorm2d(16) for _ in range(3)]
        for norm in norms:
            nn.init.normal_(norm.weight)
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), norms[0],
            QConv2d(16, 16, 3, padding=1), norms[1], QConv2d(16, 16, 3, padding=1), norms[2],
            nn.Flatten(), nn.Linear(16 * 4 * 4, 10),
        )  # fmt: skip


def _tiny(patch):
    """Everything that is built, by a few small ones under the same names, so that tests/gpu find them."""
    patch.setattr(cuda_build.models, "CONVOLUTIONS", {"7²×512": (5, 32)})
    built = zoo.Network(lambda: (_Small().eval(), torch.zeros(1, 3, 8, 8)), None)
    patch.setattr(cuda_build, "NETWORKS", {"QuickNet": built})
    patch.setattr(cuda_build, "NETWORKS_BUILT", ("QuickNet",))
    cases = [cuda_build.small_case()]
    patch.setattr(cuda_build, "GRIDS", ("layers",))
    patch.setattr(cuda_build, "grid", lambda kind: {f"{kind}-0": cases})
    patch.setattr(cuda_build, "float_twin", lambda model: torch.fx.symbolic_trace(_plain(model)))
    images = torch.from_numpy(image((3, 3, 8, 8), 3))
    patch.setattr(cuda_build, "demo_model", lambda: (_Small().eval(), images, torch.arange(3)))
    patch.setattr(cuda_limits, "ROUNDS", 2)
    patch.setattr(cuda_limits, "_WITH_WGMMA", ())  # which the emulator does not know


def _plain(model):
    layers = [nn.Conv2d(16, 16, 3, padding=1, bias=False) if isinstance(m, QConv2d) else m for m in model]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as `build` writes it, and the emulated GPU that knows its kernels."""
    gpu = EmulatedGpu(tmp_path_factory.mktemp("emulated"))
    compile_cuda = toolchain.compile_cuda

    def compile_and_add(source, sm):
        built = compile_cuda(source, sm)
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
    """Of a part, every file; and of equal files, the bundle."""
    _tiny(monkeypatch)
    cuda_build.Builder("cuda-sm_90", Options(cache=False), batches=(32,)).build(tmp_path, ["limits", "networks"])
    with cuda_folder.opened(tmp_path) as (files, _), cuda_folder.opened(folder[0]) as (before, _):
        names = sorted({path.name for path in files.iterdir()} - {cuda_folder.INDEX})
        assert names == ["QuickNet-32.so", "QuickNet-cpu.so", "QuickNet.py", "limits.cubin"]
        assert all((files / name).read_bytes() == (before / name).read_bytes() for name in names)
        cuda_folder.pack(files, tmp_path / "again")
    assert (tmp_path / "again" / cuda_folder.BUNDLE).read_bytes() == (tmp_path / cuda_folder.BUNDLE).read_bytes()


#: Small amounts: an emulated GPU takes a second for what a GPU does in a microsecond.
_LITTLE = """
import sys
from benchmarks import cuda, cuda_device, cuda_measure, cuda_run
cuda_device.BURST, cuda_measure.REPEATS, cuda_measure._CALLS, cuda_measure._FEWEST_CALLS = 1e-3, 2, 2, 2
cuda_run._MEMORY = 1 << 17
sys.exit(cuda.main(sys.argv[1:]))
"""


def _python(arguments, gpu, **properties):
    environment = {**os.environ, **gpu.environment(**properties), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


def test_run(folder, tmp_path):
    """Everything but torch runs; what it would be compared with is missing, with the reason, in the claims, too."""
    path, gpu = folder
    done = _python(["-c", _LITTLE, "run", str(path), "--results", str(tmp_path), "--name", "x", "--quick"], gpu)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["gpu"]["name"] == "Emulated GPU" and report["gpu"]["capability"] == "9.0"
    assert report["without_torch"].startswith("torch ") and "missing" in report["before"]
    assert {"b1 and", "b1 xor", "s8", "f16", "fma", "popc", "memory read", "memory copied"} <= report["limits"].keys()
    row = report["convolutions"]["7²×512"]["32"]
    assert row["tops"] > 0 and row["limit_by"] in cuda_limits.BINARY and row["share_of_limit"] > 0
    assert row["missing"].keys() == {"torch fp16", "torch fp32"}
    small = report["networks"]["QuickNet"]
    assert small["1"]["latency"]["median_ms"]["bnncc"] > 0 and "latency" not in small["32"]
    assert small["32"]["host_to_host"]["median_ms"]["bnncc"] > 0 and small["32"]["launches"] > 3
    assert {claim["verdict"] for claim in report["claims"]} == {"not measured"}
    for words in ("what the GPU does at best", "convolutions between", "float twins", "what was demanded"):
        assert words in done.stdout


def test_gpu_tests_pass_on_the_emulated_gpu(folder):
    """tests/gpu themselves: none fails, and what skips says what was not built or is not there."""
    path, gpu = folder
    arguments = [
        "-m",
        "pytest",
        "tests/gpu",
        "--artifacts",
        str(path),
        "-q",
        "-n",
        "0",
        "-rs",
        "-p",
        "no:cacheprovider",
    ]
    done = _python(arguments, gpu, memory=1 << 24)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "0 mismatches in" in done.stdout or " passed" in done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    allowed = ("was not built: leave out --only", "sees no GPU", "there is one GPU")
    assert all(any(reason in line for reason in allowed) for line in skipped), skipped


def test_run_without_a_gpu(folder, capsys):
    if cuda_device.missing() is None:
        pytest.skip("there is a GPU")
    assert cuda.main(["run", str(folder[0])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no GPU: libcuda.so.1 cannot be opened") and error.count("\n") == 1


def test_items_that_nobody_has(tmp_path, capsys):
    assert cuda.main(["build", str(tmp_path), "--only", "nothing"]) == 2
    assert "no item is named like nothing: they are limits, demo, " in capsys.readouterr().err


def test_a_target_without_a_gpu(tmp_path, capsys):
    assert cuda.main(["build", str(tmp_path), "--target", "rpi4"]) == 2
    assert "'rpi4' is no target with a GPU" in capsys.readouterr().err
