"""Target descriptors: what the passes and the schedule rules need to know about a machine.

A target is a frozen dataclass; nothing outside this package asks for one by name. `get_target` finds it: one of the
registered names, `native` (this machine), or the name of an x86-64 or AArch64 processor as LLVM spells it.
"""

from __future__ import annotations

import difflib
import functools
import platform
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from bnncc.runtime.bits import BitLayout
from bnncc.runtime.errors import BnnccError
from bnncc.targets.cuda.descriptor import CUDA_TARGETS, CudaSpec

#: What the x86-64 psABI levels ask for, in the spelling of /proc/cpuinfo.
_V2 = ("cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

#: LLVM's spelling → that of /proc/cpuinfo, for the x86 features that generated code may come to need.
_CPUINFO = {
    "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "popcnt", "cx16": "cx16",
    "sahf": "lahf_lm", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi": "bmi1", "bmi2": "bmi2",
    "lzcnt": "abm", "movbe": "movbe", "xsave": "xsave", "avx512f": "avx512f", "avx512bw": "avx512bw",
    "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl", "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2", "avx512bitalg": "avx512_bitalg", "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vnni": "avx512_vnni", "avx512ifma": "avx512ifma", "gfni": "gfni",
}  # fmt: skip

#: AArch64 processors that execute in order.
_IN_ORDER = ("cortex-a34", "cortex-a35", "cortex-a53", "cortex-a55")
#: Values whose comparison gives one mask.
MASK_LANES = 16
#: Output channels of one tile where the reduction of a binary convolution is in the lanes: their sums fill a vector.
_LANE_BLOCK = 8
#: Bytes of a reduction below which sums across lanes cost more than broadcasting the input.
_SHALLOW = 32


@dataclass(frozen=True)
class TargetSpec:
    """One machine to compile for.

    features: what the processor must have at run time, as /proc/cpuinfo spells it.
    vector_bits, registers: of the vector unit that schedules fill.
    word_bits: word that binary kernels read, and to a multiple of which a group's channels are padded.
    max_lanes: bound of the lanes of a `BitLayout`.
    masks: comparisons of vectors give masks of bits, which are packed channels if those lie in order (`max_lanes` 1).
    lane_bytes: bytes of the reduction that a binary product keeps in the lanes of a vector; 0: there lie channels.
    assembles_steps: whether the steps of those products come in assembler, see `bnncc.targets.in_order`.
    float_lanes: float32 values in a vector.
    popcount: how a binary product counts, see `bnncc.targets.rules.binary_conv`:
        "vector" (one instruction), "table" (LLVM's lookup by byte shuffles), "scalar" (POPCNT of single words),
        "bytes" (accumulators of a byte).
    dot: the instructions for products of bytes, see `bnncc.targets.intrinsics`.
    most_plane_pairs: bit planes of the activation times those of the weight up to which counting bits is faster than
        multiplying bytes.
    flushes_denormals: whether arithmetic on vectors of floats takes denormals for 0; see `bnncc.targets.scalar_floats`.
    llvm_level: LLVM's optimization level.
    zig, zig_static: the linker's triples for a shared library and for a static executable.
    """

    name: str
    arch: str
    cpu: str
    triple: str
    zig: str
    zig_static: str
    features: tuple[str, ...]
    vector_bits: int
    registers: int
    word_bits: int
    popcount: str
    dot: str
    most_plane_pairs: int
    max_lanes: int = 16
    masks: bool = False
    lane_bytes: int = 0
    assembles_steps: bool = False
    flushes_denormals: bool = False
    llvm_level: int = 3
    llvm_features: tuple[str, ...] = ()
    llvm_options: tuple[str, ...] = ()
    description: str = ""

    @property
    def float_lanes(self) -> int:
        return self.vector_bits // 32

    def bit_layout(self, channels: int, groups: int) -> BitLayout:
        """How packed activations lie. Channels that fill no whole masks lie in blocks, as on targets without masks."""
        whole = channels // groups % MASK_LANES == 0
        lanes = self.max_lanes if whole or not self.masks else MASK_LANES
        return BitLayout.for_target(channels, groups, self.word_bits, lanes)

    @property
    def pads_while_reading(self) -> bool:
        """Whether convolutions read the zeros around an image that has no padding: here, a copy of it has them."""
        return False

    @property
    def counting(self) -> str:
        """How binary products count bits, of `bnncc.dialect.computes.COUNTING`.

        By table, a full adder of three vectors takes two instructions where any function of three words is one
        (AVX-512), and spares a count of eight: 1.45 times the products. With AVX2 it takes five and gains nothing, but
        counts that stay in bytes do: 1.14 to 1.18 times the products of counts of words.
        """
        if self.popcount != "table":
            return "words"
        return "carry_save" if self.masks else "bytes"

    #: Floats of fewer bits than 32 that it multiplies faster than those: none.
    rounded_forms: ClassVar[tuple[str, ...]] = ()

    @property
    def planar_windows(self) -> bool:
        """Whether windows over the planes of an NCHW image (`bnncc.targets.rules.planar`) are worth their schedule."""
        return self.arch == "x86_64"

    def turns_results(self, shape: tuple[int, ...], groups: int, dtype: str) -> bool:
        """Whether a convolution's kernel also brings its result to NCHW (`bnncc.targets.rules.turned`).

        shape: of the result, [N, H, W, C]. Its channels must fill the vectors of weights, whatever the convolution.
        """
        _, height, width, channels = shape
        whole = channels // groups % MASK_LANES == 0 or channels // groups == _LANE_BLOCK
        return whole and height * width >= MASK_LANES and dtype in ("float32", "int32")

    @property
    def word_lanes(self) -> int:
        """Words in a vector."""
        return self.vector_bits // self.word_bits

    def binary_lanes(self, group_out: int) -> int:
        """Output channels that lie beside each other in the weights of a binary convolution (OL)."""
        return _lanes(self.word_lanes, group_out)

    def reduction_lanes(self, pixel_bytes: int, window: int, width: int, stride: int, out_channels: int) -> int:
        """Bytes of the reduction in the lanes of a binary convolution of one group, or 0 if it does not suit.

        pixel_bytes: of the packed input; a vector takes a part of a pixel or whole neighbouring pixels.
        window: positions of the kernel. width: of the output image. stride: along the width.
        """
        pixels = max(1, self.lane_bytes // pixel_bytes)
        fits = self.lane_bytes and pixels * pixel_bytes % self.lane_bytes == 0 and out_channels % _LANE_BLOCK == 0
        # The first sum across lanes widens, so at least two bytes must belong together.
        together = pixel_bytes > 1 and (pixels == 1 or (stride == 1 and width % pixels == 0))
        return self.lane_bytes if fits and together and window * pixel_bytes >= _SHALLOW else 0

    @property
    def lane_block(self) -> int:
        """Output channels whose weights lie together where the reduction is in the lanes."""
        return _LANE_BLOCK

    def conv_lanes(self, group_out: int) -> int:
        """The same for a float convolution or dense layer."""
        return _lanes(self.float_lanes, group_out)

    def byte_lanes(self, group_out: int) -> int:
        """The same for an integer convolution: no more than there are channels, for its instructions fill all of them,
        and at least 128 bits."""
        lanes = self.vector_bits // 32
        while lanes > max(4, group_out):
            lanes //= 2
        return lanes

    @property
    def byte_offset(self) -> int:
        """What is subtracted from the levels of quantized values, so that they fit the type that `dot` multiplies."""
        return 0 if self.dot in ("vnni", "maddwd") else 128

    def tvm(self) -> dict[str, Any]:
        """What `tvm.target.Target` is made from."""
        config: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu}
        config["cl-opt"] = [_NO_IF_CONVERSION, _NO_SLP, *self.llvm_options]
        if self.arch == "arm":
            config["mfloat-abi"] = "hard"  # or calls of libm pass floats in integer registers
        if self.llvm_level != 3:
            config["opt-level"] = self.llvm_level
        if self.llvm_features:
            config["mattr"] = list(self.llvm_features)
        return config


# Where there are masked loads, LLVM 22's loop vectorizer takes `i mod 4` in the address of a conditional load for `i`
# and reads past the tensor (akin to https://github.com/llvm/llvm-project/issues/156849). Loops with conditions stay
# loops then; kernels of real networks have none that it would have vectorised.
_NO_IF_CONVERSION = "-enable-if-conversion=false"
# LLVM 22's vectorizer of straight-line code narrows sums of bits to bytes, widens them with their sign and says of the
# result that it has no high bits. Kernels are vectorised before LLVM sees them.
_NO_SLP = "-vectorize-slp=false"


def _lanes(most: int, channels: int) -> int:
    """A full vector, or less where few channels would leave more than half of it empty."""
    while most > 1 and most // 2 >= channels:
        most //= 2
    return most


def _x86(name: str, cpu: str, features: tuple[str, ...], description: str) -> TargetSpec:
    wide = "avx512bw" in features and "avx512vl" in features
    counts = wide and "avx512_vpopcntdq" in features
    return TargetSpec(
        name=name,
        arch="x86_64",
        cpu=cpu,
        triple="x86_64-linux-gnu",
        zig="x86_64-linux-gnu.2.28",
        zig_static="x86_64-linux-musl",
        features=features,
        vector_bits=512 if wide else 256 if "avx2" in features else 128,
        registers=32 if wide else 16,
        word_bits=32 if counts else 64,
        # On 128 bits a table takes ten instructions for two words, POPCNT four to a word.
        popcount="vector" if counts else "table" if "avx2" in features else "scalar",
        dot="vnni" if wide and "avx512_vnni" in features else "maddwd",
        most_plane_pairs=4,
        max_lanes=1 if wide else 16,
        masks=wide,
        # LLVM halves its vectors on some processors although full ones serve these kernels better.
        llvm_features=("-prefer-256-bit",) if wide else (),
        description=description,
    )


def _aarch64(name: str, cpu: str, description: str, *, dotprod: bool = False) -> TargetSpec:
    return TargetSpec(
        name=name,
        arch="aarch64",
        # LLVM unrolls loops four times for these, and spills; its generic schedule is one for in-order cores, too.
        cpu="generic" if cpu in _IN_ORDER else cpu,
        triple="aarch64-linux-gnu",
        zig="aarch64-linux-gnu.2.28",
        zig_static="aarch64-linux-musl",
        features=("fp", "asimd", "asimddp") if dotprod else ("fp", "asimd"),
        vector_bits=128,
        registers=32,
        word_bits=8,
        popcount="bytes",
        dot="sdot" if dotprod else "smull",
        most_plane_pairs=4,
        max_lanes=8,
        lane_bytes=16,
        assembles_steps=cpu in _IN_ORDER,
        # Level 3 unrolls the steps of a binary convolution, then spills their sums.
        llvm_level=2,
        llvm_features=("+neon", "+dotprod") if dotprod else ("+neon",),
        description=description,
    )


def _arm(name: str, cpu: str, description: str, *, v8: bool = False) -> TargetSpec:
    """32-bit ARM. v8: a processor of ARMv8 with a 32-bit system."""
    return TargetSpec(
        name=name,
        arch="arm",
        cpu=cpu,
        triple="armv7-linux-gnueabihf",
        zig="arm-linux-gnueabihf.2.28",
        zig_static="arm-linux-musleabihf",
        # CRC32 came with ARMv8; 32-bit kernels list little else that did.
        features=("neon", "vfpv4", "idiva", "crc32") if v8 else ("neon", "vfpv4", "idiva"),
        vector_bits=128,
        registers=16,
        word_bits=8,
        popcount="bytes",
        dot="vmull",
        most_plane_pairs=4,
        max_lanes=8,
        lane_bytes=16,
        flushes_denormals=True,
        llvm_level=2,
        # The machine scheduler keeps sums in their registers, LLVM's older one for this architecture spills them; so
        # do unrolled steps. Scalar floats in NEON registers ("neonfp") would be vectors with their flushing.
        llvm_features=("+neon", "+vfp4", "+use-misched", "-neonfp"),
        # LLVM's loop vectorizer shuns float arithmetic here, but not comparisons, where NEON takes denormals for 0 too.
        llvm_options=("-unroll-threshold-default:uint=80", "-vectorize-loops=false"),
        description=description,
    )


_REGISTERED = {
    t.name: t
    for t in (
        _x86("x86-64-v2", "x86-64-v2", _V2, "any x86-64 since about 2009 (SSE4.2, POPCNT)"),
        _x86("x86-64-v3", "x86-64-v3", _V3, "x86-64 with AVX2 and FMA (Haswell, Zen and later)"),
        _x86("x86-64-v4", "x86-64-v4", _V4, "x86-64 with AVX-512 (Skylake-X, Zen 4 and later)"),
        # LLVM knows when the instructions of Swift finish, another core of ARMv7, but not those of the Cortex-A7.
        _arm("rpi2", "swift", "Raspberry Pi 2, 32-bit system (Cortex-A7)"),
        _arm("rpi3-32", "cortex-a53", "Raspberry Pi 3 or Zero 2 W, 32-bit system (Cortex-A53)", v8=True),
        _arm("rpi4-32", "cortex-a72", "Raspberry Pi 4, 32-bit system (Cortex-A72)", v8=True),
        _arm("armv7", "swift", "any 32-bit ARM with NEON, VFPv4 and division"),
        _aarch64("rpi3", "cortex-a53", "Raspberry Pi 3, 64-bit system (Cortex-A53)"),
        _aarch64("rpi-zero2", "cortex-a53", "Raspberry Pi Zero 2 W, 64-bit system (Cortex-A53)"),
        _aarch64("rpi4", "cortex-a72", "Raspberry Pi 4, 64-bit system (Cortex-A72)"),
        _aarch64("rpi5", "cortex-a76", "Raspberry Pi 5 (Cortex-A76)", dotprod=True),
        _aarch64("aarch64", "generic", "any 64-bit ARM"),
    )
}


@dataclass(frozen=True)
class TargetFamily:
    """Several targets in one artifact, for machines of one architecture. members: names, the most demanding first."""

    name: str
    members: tuple[str, ...]
    description: str

    def targets(self) -> tuple[AnyTarget, ...]:
        return tuple(map(get_target, self.members))


#: icelake-server stands for AVX-512 with VPOPCNTDQ and VNNI: all of it from Intel since Ice Lake, from AMD since Zen 4.
_FAMILIES = {
    f.name: f
    for f in (
        TargetFamily(
            "x86-64",
            ("icelake-server", "x86-64-v4", "x86-64-v3", "x86-64-v2"),
            "all of x86-64-v2, -v3, -v4 and icelake-server in one artifact, which takes the best when it is loaded",
        ),
    )
}


def target_names() -> tuple[str, ...]:
    """The names to show a user; processor names are accepted besides."""
    return ("native", *_REGISTERED, *_FAMILIES, *CUDA_TARGETS)


def all_targets() -> tuple[TargetSpec, ...]:
    """The registered targets, without `native`."""
    return tuple(_REGISTERED.values())


def all_families() -> tuple[TargetFamily, ...]:
    """The registered families."""
    return tuple(_FAMILIES.values())


#: What can be compiled for.
AnyTarget = TargetSpec | CudaSpec


def get_targets(name: str | AnyTarget) -> tuple[AnyTarget, ...]:
    """What an artifact for that name is compiled for, the most demanding first: one target, or all of a family.

    Raises BnnccError as `get_target`.
    """
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    return family.targets() if family else (get_target(name),)


def get_target(name: str | AnyTarget) -> AnyTarget:
    """The one target of that name. Raises BnnccError, with the nearest names, for any other."""
    if isinstance(name, (TargetSpec, CudaSpec)):
        return name
    if name == "native":
        return native()
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in CUDA_TARGETS:
        return CUDA_TARGETS[name]
    if name in _FAMILIES:
        raise BnnccError(f"{name} stands for several targets: name one of {', '.join(_FAMILIES[name].members)}")
    spec = _by_cpu(name)
    if spec is not None:
        return spec
    near = difflib.get_close_matches(name, [*target_names(), *_cpu_names("x86_64-linux-gnu")], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise BnnccError(
        f"unknown target {name!r}: {hint}Targets are {', '.join(target_names())}, or a processor name such as znver4"
    )


@functools.cache
def native() -> TargetSpec:
    """This machine."""
    from tvm.target import codegen

    machine = platform.machine().lower()
    cpu = codegen.llvm_get_system_cpu()
    if machine in ("x86_64", "amd64"):
        # A hypervisor may hide features that the processor's name promises, so the kernel's list is asked as well.
        present = _cpuinfo_features()
        promised = _llvm_features("x86_64-linux-gnu", cpu)
        hidden = tuple(f"-{llvm}" for llvm in sorted(promised & _CPUINFO.keys()) if _CPUINFO[llvm] not in present)
        features = _x86_features({f for f in promised if _CPUINFO.get(f) in present})
        spec = _x86("native", cpu, features, f"this machine ({cpu})")
        return replace(spec, llvm_features=(*spec.llvm_features, *hidden))
    if machine in ("aarch64", "arm64"):
        return _aarch64("native", cpu, f"this machine ({cpu})", dotprod="asimddp" in _cpuinfo_features())
    raise BnnccError(f"no native target for a {machine} machine: name one of {', '.join(_REGISTERED)}")


@functools.cache
def _by_cpu(name: str) -> TargetSpec | None:
    if name in _cpu_names("x86_64-linux-gnu"):
        features = _llvm_features("x86_64-linux-gnu", name)
        if "64bit" in features and "sse4.2" in features:
            return _x86(name, name, _x86_features(features), f"x86-64 processor {name}")
    elif name in _cpu_names("aarch64-linux-gnu"):
        dotprod = "dotprod" in _llvm_features("aarch64-linux-gnu", name)
        return _aarch64(name, name, f"64-bit ARM processor {name}", dotprod=dotprod)
    return None


@functools.cache
def _cpu_names(triple: str) -> tuple[str, ...]:
    from tvm.target import Target, codegen

    return tuple(str(n) for n in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": triple})))


def _llvm_features(triple: str, cpu: str) -> set[str]:
    from tvm.target import Target, codegen

    found = codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mtriple": triple, "mcpu": cpu}))
    return {str(f) for f in found}


def _x86_features(llvm: set[str]) -> tuple[str, ...]:
    return tuple(cpuinfo for name, cpuinfo in _CPUINFO.items() if name in llvm)


def _cpuinfo_features() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
            for line in f:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()
