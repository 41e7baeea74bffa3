"""What a GPU can do at best: kernels that repeat one instruction on registers, and kernels that read and copy memory.

Every kernel takes two pointers, `in` and `out`. Of `in`, a thread of an arithmetic kernel reads its operands, 8 words
from 8·thread on; to `out` it writes its accumulators. `CHAINS` instructions are independent of each other, so that none
waits for the one before; nothing but registers is touched in between, so no kernel of a network can be faster. One
multiply-accumulate is two operations. `python -m benchmarks.cuda build` compiles the module; measuring needs NumPy
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.cuda_device import Contender, Gpu, interleaved

#: Instructions of a round that are independent of each other, and rounds of a launch that is timed.
CHAINS, ROUNDS = 8, 4096
_THREADS, _WARP = 256, 32
#: Blocks of a multiprocessor in a launch: 16 warps, four to each of its quarters.
_BLOCKS_PER_SM = 2
#: Vectors of 16 bytes that a thread of a memory kernel moves.
_VECTORS = 8

#: What counts bits or can stand in for it: the fastest of these is the limit of a binary layer.
BINARY = ("b1 and", "b1 xor", "b1 and, wgmma", "s8")


@dataclass(frozen=True)
class Limit:
    """A kernel. operations: of a thread in a launch; 0 where memory is moved. moved: bytes of a thread, likewise.

    inputs, outputs: words that a thread reads and writes. module: the one it is in.
    """

    function: str
    operations: float = 0.0
    moved: int = 0
    inputs: int = 8
    outputs: int = 4 * CHAINS
    module: str = "limits"


@dataclass(frozen=True)
class _Product:
    """``mma.sync``: the shape (M, N, K), and the words of a fragment of A, B and of the accumulator."""

    opcode: str
    shape: tuple[int, int, int]
    words: tuple[int, int, int]
    letter: str = "r"


def _products(number: int) -> dict[str, _Product]:
    """The tiles that an architecture has, by name."""
    if number < 80:
        return {
            "b1 xor": _Product("m8n8k128.row.col.s32.b1.b1.s32.xor.popc", (8, 8, 128), (1, 1, 2)),
            "s8": _Product("m8n8k16.row.col.s32.s8.s8.s32", (8, 8, 16), (1, 1, 2)),
            "f16": _Product("m16n8k8.row.col.f32.f16.f16.f32", (16, 8, 8), (2, 1, 4), "f"),
        }
    return {
        "b1 and": _Product("m16n8k256.row.col.s32.b1.b1.s32.and.popc", (16, 8, 256), (4, 2, 4)),
        "b1 xor": _Product("m16n8k256.row.col.s32.b1.b1.s32.xor.popc", (16, 8, 256), (4, 2, 4)),
        "s8": _Product("m16n8k32.row.col.s32.s8.s8.s32", (16, 8, 32), (4, 2, 4)),
        "f16": _Product("m16n8k16.row.col.f32.f16.f16.f32", (16, 8, 16), (4, 2, 4), "f"),
    }


def _number(sm: str) -> int:
    return int(sm.removeprefix("sm_").rstrip("af"))


def limits(sm: str, rounds: int | None = None) -> dict[str, Limit]:
    """The kernels for an architecture, by what they measure. rounds: None for `ROUNDS`."""
    found, rounds = {}, rounds or ROUNDS
    for name, product in _products(_number(sm)).items():
        m, n, k = product.shape
        found[name] = Limit(_function(name), 2.0 * m * n * k * CHAINS * rounds / _WARP)
    found["popc"] = Limit("limit_popc", 2.0 * 32 * 4 * CHAINS * rounds)
    found["fma"] = Limit("limit_fma", 2.0 * 4 * CHAINS * rounds)
    if sm in _WITH_WGMMA:
        m, n, k = _WGMMA
        operations = 2.0 * m * n * k * CHAINS * rounds / (4 * _WARP)
        found["b1 and, wgmma"] = Limit("limit_wgmma", operations, inputs=0, outputs=n // 2, module="limits-sm_90a")
    found["memory read"] = Limit("limit_read", moved=16 * _VECTORS, inputs=4 * _VECTORS, outputs=1)
    found["memory copied"] = Limit("limit_copy", moved=32 * _VECTORS, inputs=4 * _VECTORS, outputs=4 * _VECTORS)
    return found


def sources(sm: str, rounds: int | None = None) -> dict[str, tuple[str, str]]:
    """Module → (architecture, CUDA C). rounds: None for `ROUNDS`."""
    rounds = rounds or ROUNDS
    kernels = [_mma(_function(name), product, rounds) for name, product in _products(_number(sm)).items()]
    found = {"limits": (sm, "\n".join([*kernels, _scalars(rounds), _MEMORY.replace("VECTORS", str(_VECTORS))]))}
    if sm in _WITH_WGMMA:
        found["limits-sm_90a"] = ("sm_90a", _wgmma(rounds))
    return found


def _function(name: str) -> str:
    return f"limit_{name.replace(' ', '_')}"


_HEAD = 'extern "C" __global__ void __launch_bounds__(256) '
_THREAD = "  const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;\n"
_OPERANDS = """\
  unsigned a[4], b[4];
  for (int i = 0; i < 4; i++) {
    a[i] = in[8 * thread + i];
    b[i] = in[8 * thread + 4 + i];
  }
"""


def _mma(function: str, product: _Product, rounds: int) -> str:
    kind = "float" if product.letter == "f" else "int"
    a, b, d = product.words
    groups, at = [], 0
    for count in (d, a, b):
        groups.append("{" + ", ".join(f"%{at + i}" for i in range(count)) + "}")
        at += count
    text = f"mma.sync.aligned.{product.opcode} {groups[0]}, {groups[1]}, {groups[2]}, {groups[0]};"
    given = ", ".join([*(f'"r"(a[{i}])' for i in range(a)), *(f'"r"(b[{i}])' for i in range(b))])
    lines = []
    for chain in range(CHAINS):
        taken = ", ".join(f'"+{product.letter}"(d[{4 * chain + i}])' for i in range(d))
        lines.append(f'    asm volatile("{text}" : {taken} : {given});')
    return _arithmetic(function, kind, rounds, "\n".join(lines))


def _arithmetic(function: str, kind: str, rounds: int, body: str) -> str:
    words = 4 * CHAINS
    return (
        f"{_HEAD}{function}(const unsigned* in, {kind}* out) {{\n{_THREAD}{_OPERANDS}"
        f"  {kind} d[{words}];\n"
        f"  for (int i = 0; i < {words}; i++) d[i] = 0;\n"
        f"  #pragma unroll 1\n"
        f"  for (int round = 0; round < {rounds}; round++) {{\n{body}\n  }}\n"
        f"  for (int i = 0; i < {words}; i++) out[{words} * thread + i] = d[i];\n}}\n"
    )


def _scalars(rounds: int) -> str:
    """Fused multiply-adds of float32; and xor, population count and addition of words of 32 bits."""
    each = range(4 * CHAINS)
    fma = "\n".join(
        f"    d[{i}] = __fmaf_rn(d[{i}], __uint_as_float(a[{i % 4}]), __uint_as_float(b[{i % 4}]));" for i in each
    )
    popc = "\n".join(f"    d[{i}] += __popc((unsigned)d[{i}] ^ a[{i % 4}]);" for i in each)
    return _arithmetic("limit_fma", "float", rounds, fma) + _arithmetic("limit_popc", "int", rounds, popc)


# A sum that nobody can do without, so that the reads stay.
_MEMORY = f"""\
{_HEAD}limit_read(const uint4* in, unsigned* out) {{
  unsigned sum = 0;
  for (int i = 0; i < VECTORS; i++) {{
    uint4 v = in[(blockIdx.x * VECTORS + i) * 256u + threadIdx.x];
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }}
  if (sum == 0x9e3779b9u) out[blockIdx.x * 256u + threadIdx.x] = sum;
}}
{_HEAD}limit_copy(const uint4* in, uint4* out) {{
  for (int i = 0; i < VECTORS; i++)
    out[(blockIdx.x * VECTORS + i) * 256u + threadIdx.x] = in[(blockIdx.x * VECTORS + i) * 256u + threadIdx.x];
}}
"""

#: The tile of one ``wgmma`` of four warps, and the architectures that have it; their names get an "a" then.
_WGMMA, _WITH_WGMMA = (64, 128, 256), ("sm_90",)


def _wgmma(rounds: int) -> str:
    """Hopper's product of four warps at once, whose operands lie in shared memory: descriptors of core matrices of
    128 bytes without swizzling (PTX ISA 9.7.16, "Asynchronous Warpgroup Level Matrix Instructions")."""
    _, n, _ = _WGMMA
    words = n // 2
    d = ", ".join(f"%{i}" for i in range(words))
    text = f"wgmma.mma_async.sync.aligned.m64n{n}k256.s32.b1.b1.and.popc {{{d}}}, %{words}, %{words + 1}, 1;"
    taken = ", ".join(f'"+r"(d[{i}])' for i in range(words))
    product = f'    asm volatile("{text}" : {taken} : "l"(a), "l"(b));'
    return f"""\
{_HEAD}limit_wgmma(const unsigned* in, int* out) {{
{_THREAD}\
  __shared__ __align__(128) unsigned tiles[4096];
  for (int i = threadIdx.x; i < 4096; i += 256) tiles[i] = 0x9e3779b9u * i;
  __syncthreads();
  asm volatile("fence.proxy.async;");
  unsigned base = (unsigned)__cvta_generic_to_shared(tiles);
  const unsigned long long strides = (8ull << 16) | (16ull << 32);
  unsigned long long a = strides | (base >> 4), b = strides | ((base + 4096) >> 4);
  int d[{words}];
  for (int i = 0; i < {words}; i++) d[i] = 0;
  #pragma unroll 1
  for (int round = 0; round < {rounds}; round++) {{
    asm volatile("wgmma.fence.sync.aligned;");
{chr(10).join([product] * CHAINS)}
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");
  }}
  for (int i = 0; i < {words}; i++) out[{words} * thread + i] = d[i];
}}
"""


def table(sm: str) -> dict[str, dict[str, Any]]:
    """`limits` as they stand in the index of what was built."""
    return {name: asdict(limit) for name, limit in limits(sm).items()}


class Limits:
    """The kernels on a GPU, ready to be launched.

    images: module → cubin. rows: as of `table`. memory: bytes that the memory kernels read.
    """

    def __init__(
        self, gpu: Gpu, images: Mapping[str, bytes], rows: Mapping[str, Mapping[str, Any]], memory: int
    ) -> None:
        self.limits = {name: Limit(**row) for name, row in rows.items()}
        modules = {name: gpu.module(image) for name, image in images.items()}
        self._amounts: dict[str, float] = {}
        self._contenders: dict[str, Contender] = {}
        blocks = {
            name: memory // (_THREADS * limit.moved // (2 if limit.outputs > 1 else 1))
            if limit.moved
            else _BLOCKS_PER_SM * gpu.multiprocessors
            for name, limit in self.limits.items()
        }
        words = {
            name: (limit.inputs * _THREADS * blocks[name], limit.outputs * _THREADS * blocks[name])
            for name, limit in self.limits.items()
        }
        source = gpu.allocate(4 * max(pair[0] for pair in words.values()))
        target = gpu.allocate(4 * max(pair[1] for pair in words.values()))
        gpu.fill(source, np.random.default_rng(0))
        self._memory = source, target  # graphs hold addresses only
        for name, limit in self.limits.items():
            function = modules[limit.module].function(limit.function)
            self._contenders[name] = gpu.graph(
                [(function, (blocks[name], 1, 1), (_THREADS, 1, 1), 0, (source.address, target.address))]
            ).launch
            self._amounts[name] = (limit.operations or limit.moved) * _THREADS * blocks[name]

    def contender(self, name: str) -> Contender:
        """One launch of a kernel."""
        return self._contenders[name]

    def rate(self, name: str, seconds: float) -> float:
        """Operations, or bytes, a second of a launch that took so long."""
        return self._amounts[name] / seconds

    def measure(self, gpu: Gpu, seconds: float) -> dict[str, dict[str, float]]:
        """Of each: {"tops": 10¹² operations a second} or {"gbs": 10⁹ bytes a second}, and "us" of a launch."""
        found = {}
        for name, took in interleaved(gpu, self._contenders, seconds).items():
            rate = self.rate(name, took)
            of = {"tops": round(1e-12 * rate, 2)} if self.limits[name].operations else {"gbs": round(1e-9 * rate, 1)}
            found[name] = {**of, "us": round(1e6 * took, 2)}
        return found


def best_for_bits(measured: Mapping[str, Mapping[str, float]]) -> str:
    """The fastest of those that multiply bits."""
    return max((name for name in BINARY if name in measured), key=lambda name: measured[name]["tops"])
