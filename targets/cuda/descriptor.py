"""Descriptors of GPUs: an architecture of NVIDIA's and the machine it sits in.

The passes ask a `CudaSpec` what they ask a `TargetSpec` (`bnncc.targets.descriptor`); schedule rules read its fields
and never its name. Names: "cuda-sm_90" for a machine with x86-64, "cuda-sm_90-aarch64" for one with 64-bit ARM (Grace),
"jetson-orin" for the board.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bnncc.runtime.bits import BitLayout

#: Threads of a warp, which is also the number of bits of a word: one ballot packs one word.
WARP = 32


@dataclass(frozen=True)
class Architecture:
    """One architecture of NVIDIA GPUs, as the CUDA C++ programming guide (compute capabilities) has it.

    sm: "sm_90". product: the instruction that multiplies tiles of bits.
        "b1.and", "b1.xor": ``mma.sync.m16n8k256`` with that operation, where the hardware has it;
        "b1.xor.m8n8k128": the smaller tile of the first generation that counts bits;
        "s8": bits become bytes for ``mma.sync.m16n8k32``, where tiles of bits are emulated.
    async_copies: ``cp.async`` from global to shared memory.
    most_shared: bytes of shared memory that a block can ask for. shared_per_sm, threads_per_sm, blocks_per_sm,
        registers_per_sm: of a multiprocessor, at most. sms: multiprocessors of the largest GPU, for choosing tiles.
    tile_registers: that a thread has for the sums and fragments of bits and bytes: the rest of its 255 is for addresses
        and copies.
    """

    sm: str
    product: str
    async_copies: bool
    most_shared: int
    shared_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int
    sms: int
    description: str
    registers_per_sm: int = 65536
    tile_registers: int = 192

    @property
    def bit_operations(self) -> tuple[str, ...]:
        """What the hardware does with two bits before it counts; bytes multiply them, which is "and".

        By ptxas and nvdisasm of CUDA 13.0: one BMMA.168256 either way on sm_80 … sm_89, one with AND alone on sm_90.
        """
        return {"b1.xor": ("xor", "and"), "b1.xor.m8n8k128": ("xor",)}.get(self.product, ("and",))

    @property
    def small_mma(self) -> bool:
        """Whether tensor cores take 8 rows, and half the depth, at once: a fragment of 16 is four instructions."""
        return self.product == "b1.xor.m8n8k128"

    @property
    def capability(self) -> tuple[int, int]:
        """(major, minor)."""
        number = int(self.sm.removeprefix("sm_"))
        return number // 10, number % 10


_KB = 1024
ARCHITECTURES = {
    a.sm: a
    for a in (
        Architecture("sm_75", "b1.xor.m8n8k128", False, 64 * _KB, 64 * _KB, 1024, 16, 72, "Turing: T4, RTX 20"),
        Architecture("sm_80", "b1.xor", True, 163 * _KB, 164 * _KB, 2048, 32, 108, "Ampere: A100, A30"),
        Architecture("sm_86", "b1.xor", True, 99 * _KB, 100 * _KB, 1536, 16, 84, "Ampere: RTX 30, A10, A40"),
        Architecture("sm_87", "b1.xor", True, 163 * _KB, 164 * _KB, 1536, 16, 16, "Ampere: Jetson Orin"),
        Architecture("sm_89", "b1.xor", True, 99 * _KB, 100 * _KB, 1536, 24, 144, "Ada: RTX 40, L4, L40"),
        Architecture("sm_90", "b1.and", True, 227 * _KB, 228 * _KB, 2048, 32, 132, "Hopper: H100, H200, GH200"),
        Architecture("sm_100", "s8", True, 227 * _KB, 228 * _KB, 2048, 32, 148, "Blackwell: B200, GB200"),
        Architecture("sm_120", "s8", True, 99 * _KB, 100 * _KB, 1536, 24, 170, "Blackwell: RTX 50, RTX PRO"),
    )
}


@dataclass(frozen=True)
class CudaSpec:
    """One GPU in one kind of machine.

    arch, triple, zig, zig_static, features: of the host, as in `TargetSpec`; the host runs the driver alone.
    """

    name: str
    gpu: Architecture
    arch: str
    triple: str
    zig: str
    zig_static: str
    description: str
    features: tuple[str, ...] = ()

    @property
    def sm(self) -> str:
        return self.gpu.sm

    @property
    def cpu(self) -> str:
        """What the manifest names as the processor."""
        return self.gpu.sm

    # -- what passes ask ---------------------------------------------------------------------------------------------

    word_bits = WARP
    counting = "words"
    planar_windows = False

    @property
    def rounded_forms(self) -> tuple[str, ...]:
        """Floats of fewer bits that tensor cores multiply, adding up 32-bit floats."""
        return ("float16",) if self.gpu.capability < (8, 0) else ("tf32", "float16")

    #: Padding with bit 0 or with 0.0 happens while a convolution reads.
    pads_while_reading = True

    @property
    def most_plane_pairs(self) -> int:
        """Bit planes of the activation times those of the weight up to which counting bits is faster than multiplying
        bytes: tiles of bits have eight times the throughput of bytes where the hardware has them."""
        return 1 if self.gpu.product == "s8" else 4

    def bit_layout(self, channels: int, groups: int) -> BitLayout:
        """Channels lie in their own order, so that a ballot of a warp is a word."""
        return BitLayout.for_target(channels, groups, WARP, 1)

    def binary_lanes(self, group_out: int) -> int:
        """Weights lie output channel by output channel, as tensor cores take them."""
        return 1

    def reduction_lanes(self, pixel_bytes: int, window: int, width: int, stride: int, out_channels: int) -> int:
        return 0

    def conv_lanes(self, group_out: int) -> int:
        """The weights of a float layer are a matrix, all its output channels beside each other: any tile is as wide as
        it likes. They are filled up to whole vectors of 16 bytes."""
        return -(-group_out // 4) * 4

    def byte_lanes(self, group_out: int) -> int:
        return 1

    @property
    def byte_offset(self) -> int:
        """Both operands of a product of bytes are signed."""
        return 128

    def turns_results(self, shape: tuple[int, ...], groups: int, dtype: str) -> bool:
        return False

    def tvm(self) -> dict[str, Any]:
        """What `tvm.target.Target` is made from."""
        return {"kind": "cuda", "arch": self.sm, "host": {"kind": "llvm", "mtriple": self.triple}}


def _spec(name: str, sm: str, arch: str, description: str) -> CudaSpec:
    return CudaSpec(
        name=name,
        gpu=ARCHITECTURES[sm],
        arch=arch,
        triple=f"{arch}-linux-gnu",
        zig=f"{arch}-linux-gnu.2.28",
        zig_static=f"{arch}-linux-musl",
        description=description,
    )


CUDA_TARGETS = {
    spec.name: spec
    for spec in (
        *(_spec(f"cuda-{sm}", sm, "x86_64", f"NVIDIA {a.description}") for sm, a in ARCHITECTURES.items()),
        *(
            _spec(
                f"cuda-{sm}-aarch64", sm, "aarch64", f"NVIDIA {ARCHITECTURES[sm].description}, in a 64-bit ARM machine"
            )
            for sm in ("sm_87", "sm_90", "sm_100")
        ),
        _spec("jetson-orin", "sm_87", "aarch64", "NVIDIA Jetson Orin"),
    )
}
