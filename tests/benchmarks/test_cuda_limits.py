"""Kernels that measure what a GPU can do at best: they hold the instructions they are named after, and compute them."""

import numpy as np
import pytest
from emulator import emulate

from benchmarks import cuda_limits
from bnncc.targets.cuda import toolchain
from bnncc.targets.cuda.cubin import resources
from bnncc.targets.cuda.descriptor import ARCHITECTURES


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
