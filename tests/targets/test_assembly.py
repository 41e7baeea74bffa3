"""What the compiler makes of the inner loops: vector instructions, and no register spilt to the stack."""

from __future__ import annotations

import re
import shutil

import pytest
from tvm import te

from bnncc.dialect import computes, computes_float, computes_images
from bnncc.runtime.bits import BitLayout
from bnncc.targets import emit, mca
from bnncc.targets.descriptor import TargetSpec, get_target

from .kernels import prim_func

SHAPES = [(56, 64), (28, 128), (14, 256), (7, 512)]

#: Target → what an instruction that counts bits looks like.
POPCOUNT = {
    "znver4": r"\bvpopcnt[dq]\b",
    "icelake-server": r"\bvpopcnt[dq]\b",
    "x86-64-v4": r"\bvpshufb\b",
    "x86-64-v3": r"\bvpshufb\b",
    "x86-64-v2": r"\bpopcntq\b",
    "rpi4": r"\bcnt\b",
    "aarch64": r"\bcnt\b",
}
FMA = {"znver4": r"\bvfmadd\w+ps\b", "x86-64-v3": r"\bvfmadd\w+ps\b", "rpi4": r"\bfmla\b", "aarch64": r"\bfmla\b"}


#: Labels of LLVM's basic blocks, and of loops in assembler.
_LABEL = r"(\.L(?:BB|bnncc)\w+)"


def inner_loops(assembly: str) -> list[list[str]]:
    """Bodies of the loops that hold no other label."""
    lines = assembly.split("\n")
    labels: dict[str, int] = {}
    found = []
    for number, line in enumerate(lines):
        if match := re.match(_LABEL + ":", line):
            labels[match[1]] = number
        match = re.match(r"\s+(?:j\w+|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+" + _LABEL, line)
        if match and match[1] in labels:
            body = lines[labels[match[1]] + 1 : number]
            if not any(re.match(_LABEL, text) for text in body):
                found.append([text for text in body if re.match(r"\s+[a-z]", text)])
    return found


def hottest(assembly: str, instruction: str) -> list[str]:
    return max(inner_loops(assembly), key=lambda body: sum(bool(re.search(instruction, line)) for line in body))


def _touches_stack(line: str) -> bool:
    return bool(re.search(r"\(%rsp|\[sp\b", line))


@pytest.mark.parametrize(("size", "channels"), SHAPES)
@pytest.mark.parametrize("target", POPCOUNT)
def test_binary_inner_loop(target: str, size: int, channels: int) -> None:
    spec = get_target(target)
    layout = BitLayout.for_target(channels, 1, spec.word_bits, spec.max_lanes)
    lanes = spec.binary_lanes(channels)
    x = te.placeholder((1, size + 2, size + 2, layout.words), layout.word_dtype, "x")
    w = te.placeholder((1, channels // lanes, 3, 3, layout.group_words, lanes), layout.word_dtype, "w")
    a, b = (te.placeholder((channels,), "float32", name) for name in "ab")
    dot = computes.binary_conv2d(x, w, depth=9 * channels, out_channels=channels)
    y = computes_float.scale_shift(computes_float.to_float(dot), a, b)
    body = hottest(emit.assembly(prim_func([x, w, a, b], [y]), spec), POPCOUNT[target])
    counts = sum(bool(re.search(POPCOUNT[target], line)) for line in body)
    assert counts >= 5
    if spec.popcount != "scalar":  # sixteen general registers hold no tile and its addresses
        # Where LLVM unrolls four steps of the reduction it may keep a few vectors too many alive.
        assert sum(map(_touches_stack, body)) <= len(body) // 30


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("target", ["znver4", "icelake-server"])
def test_thresholds_of_a_binary_convolution_are_masks(target: str, kernel: int) -> None:
    """A comparison and a store of its mask for each vector of sums, and nothing in a workspace."""
    spec = get_target(target)
    layout = BitLayout.for_target(64, 1, spec.word_bits, spec.max_lanes)
    lanes = spec.binary_lanes(64)
    size = 28 + kernel - 1
    x = te.placeholder((1, size, size, layout.words), layout.word_dtype, "x")
    w = te.placeholder((1, 64 // lanes, kernel, kernel, layout.group_words, lanes), layout.word_dtype, "w")
    t = te.placeholder((64,), "int32", "t")
    dot = computes.binary_conv2d(x, w, depth=kernel * kernel * 64, out_channels=64)
    text = emit.assembly(prim_func([x, w, t], [computes.threshold_pack(dot, t, layout)]), spec)
    comparisons = len(re.findall(r"\bvpcmp\w*d\s.*%zmm\d+, %k", text))
    assert comparisons >= 8
    assert len(re.findall(r"\bkmovw\s+%k\d, .*\(", text)) >= comparisons
    assert not re.search(r"\bvpmovd|\bvpmovm2", text)
    assert "AllocWorkspace" not in text


def _lane_conv(spec: TargetSpec, size: int, channels: int) -> str:
    """The assembly of a convolution 3×3 with the reduction in the lanes."""
    size_in_bytes = channels // 8
    x = te.placeholder((1, size + 2, size + 2, size_in_bytes), "uint8", "x")
    shape = (channels // spec.lane_block, 3, 3, max(1, size_in_bytes // 16), spec.lane_block, 16)
    w = te.placeholder(shape, "uint8", "w")
    a, b = (te.placeholder((channels,), "float32", name) for name in "ab")
    dot = computes.binary_conv2d(x, w, depth=9 * channels, out_channels=channels, in_lanes=16)
    y = computes_float.scale_shift(computes_float.to_float(dot), a, b)
    return emit.assembly(prim_func([x, w, a, b], [y]), spec)


def _binary_loop(spec: TargetSpec, size: int, channels: int) -> mca.Block:
    """The inner loop of that with the most binary products."""
    code = mca.read_assembly(_lane_conv(spec, size, channels))
    return max(mca.inner_loops(mca.basic_blocks(code)), key=lambda loop: sum(i.macs for i in loop))


@pytest.mark.parametrize("tensors", [1, 4, 6])
@pytest.mark.parametrize("target", ["znver4", "x86-64-v4"])
def test_masks_of_a_padded_image_never_pass_the_stack(target: str, tensors: int) -> None:
    """Two bytes stored there and sixteen loaded wait for the cache: five times as long as the rest."""
    spec, channels = get_target(target), 64 * tensors
    parts = [te.placeholder((1, 56, 56, 64), "float32", f"x{i}") for i in range(tensors)]
    a, b = (te.placeholder((channels,), "float32", name) for name in "ab")
    image = computes_images.concat(*parts) if tensors > 1 else parts[0]
    signs = computes_float.scale_shift(image, a, b)
    bits = computes.pack(signs, spec.bit_layout(channels, 1), "not_lt", padding=(1, 1, 1, 1))
    assembly = emit.assembly(prim_func([*parts, a, b], [bits]), spec)
    masks = re.findall(r"\bkmov\w\s+%k.*", assembly)
    assert masks
    assert not any(map(_touches_stack, masks))


@pytest.mark.parametrize(("size", "channels"), SHAPES)
@pytest.mark.parametrize("target", ["rpi3", "rpi4", "rpi5", "aarch64"])
def test_binary_inner_loop_with_the_reduction_in_the_lanes(target: str, size: int, channels: int) -> None:
    """Loads, EOR, CNT, ADD and what counts the steps: nothing is broadcast, nothing summed across lanes."""
    spec = get_target(target)
    assert spec.reduction_lanes(channels // 8, 9, size, 1, channels) == 16
    body = hottest(_lane_conv(spec, size, channels), POPCOUNT["rpi4"])
    steps = sum(bool(re.search(r"\bcnt\s+v", line)) for line in body)
    vector = [line for line in body if re.search(r"\bv\d+\.", line)]
    assert steps >= 16
    # LLVM's generic schedule copies two registers where it unrolls two steps.
    assert len(vector) <= 3 * steps + steps // 16
    assert all(re.match(r"\s+(eor|cnt|add|mov)\s", line) for line in vector)
    assert sum(map(_touches_stack, body)) <= len(body) // 20


@pytest.mark.skipif(shutil.which("llvm-mca-19") is None, reason="needs llvm-mca-19")
@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_binary_inner_loop_in_assembler(size: int, channels: int) -> None:
    """At least 34 products a cycle on a Cortex-A53, whose one pipe allows 42.7 beside neither loads nor a branch."""
    spec = get_target("rpi3")
    body = _binary_loop(spec, size, channels)
    (cycles,) = mca.cycles_of([body], "cortex-a53")
    assert sum(i.macs for i in body) >= 34 * cycles
    vector = [i for i in body if re.search(r"\bv\d+\.", i.text)]
    assert len(vector) == 3 * sum(i.macs for i in body) // 128
    assert not [i.text for i in body if "sp" in i.text]


@pytest.mark.skipif(shutil.which("llvm-mca-19") is None, reason="needs llvm-mca-19")
@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_binary_inner_loop_of_32_bit_arm(size: int, channels: int) -> None:
    """At least 60 products a cycle on a Cortex-A72, whose two pipes allow 85; Larq Compute Engine's loop has 64."""
    spec = get_target("rpi4-32")
    body = _binary_loop(spec, size, channels)
    (cycles,) = mca.cycles_of([body], "cortex-a72", arch="arm")
    assert sum(i.macs for i in body) >= 60 * cycles
    assert not [i.text for i in body if "sp" in i.text or i.text.startswith("vstm")]


@pytest.mark.parametrize(("size", "channels"), SHAPES[:2])
@pytest.mark.parametrize("target", FMA)
def test_float_inner_loop(target: str, size: int, channels: int) -> None:
    spec = get_target(target)
    lanes = spec.conv_lanes(channels)
    x = te.placeholder((1, size + 2, size + 2, channels), "float32", "x")
    w = te.placeholder((1, channels // lanes, 3, 3, channels, lanes), "float32", "w")
    y = computes_float.relu(computes_float.conv2d(x, w, out_channels=channels))
    body = hottest(emit.assembly(prim_func([x, w], [y]), spec), FMA[target])
    assert sum(bool(re.search(FMA[target], line)) for line in body) >= 8
    assert not [line for line in body if _touches_stack(line)]


@pytest.mark.parametrize("width", [7, 14, 56])
@pytest.mark.parametrize("target", ["znver4", "x86-64-v3"])
def test_depthwise_sums_hide_the_latency_of_an_addition(target: str, width: int) -> None:
    spec = get_target(target)
    x, w = (te.placeholder(shape, "float32", name) for shape, name in (((1, width, width, 64), "x"), ((7, 7, 64), "w")))
    y = computes_float.depthwise_conv2d(x, w, padding=(3, 3, 3, 3))
    added = re.findall(FMA[target] + r".*[, ](%[yz]mm\d+)$", emit.assembly(prim_func([x, w], [y]), spec), re.M)
    assert len(set(added)) >= 7
