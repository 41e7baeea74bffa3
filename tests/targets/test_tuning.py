"""Tuning: the database keeps what was found and refuses what is none; tiles are legal; searches end, results stay."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from bnncc.dialect import computes, computes_float, reference
from bnncc.passes.pack_bits import reduction_in_lanes
from bnncc.runtime.bits import BitLayout
from bnncc.runtime.errors import BnnccError
from bnncc.targets import emit, mca, search, tuning
from bnncc.targets.descriptor import get_target, native
from bnncc.targets.rules.candidates import candidates, is_legal
from bnncc.targets.rules.tiles import Shape, Tile, TileRequest, choose_tile

from .kernels import Kernel, aligned

RPI4 = get_target("rpi4")


def conv(target, image=(1, 6, 13), channels=40, out=48, kernel=(3, 3)) -> Kernel:
    """A binary convolution; its arguments of random bits stand in `arrays`."""
    draw = np.random.default_rng(0)
    signs = [draw.choice(np.array([-1, 1], np.int8), size) for size in ((*image, channels), (out, channels, *kernel))]
    layout = BitLayout.for_target(channels, 1, target.word_bits, target.max_lanes)
    words = reference.pack_signs(signs[0], layout)
    lanes = target.lane_block if target.lane_bytes else target.binary_lanes(out)
    packed = reference.pack_conv_weights(signs[1], layout, lanes)
    if target.lane_bytes:
        packed = reduction_in_lanes(packed, target.lane_bytes)
    depth = channels * kernel[0] * kernel[1]
    made = Kernel(
        target,
        lambda a, b: computes.binary_conv2d(a, b, depth=depth, out_channels=out, in_lanes=target.lane_bytes),
        words,
        packed,
    )
    made.arrays = (words, packed)
    return made


def float_conv(target, image, channels, out, groups=1) -> Kernel:
    draw = np.random.default_rng(1)
    x = draw.standard_normal((*image, channels)).astype(np.float32)
    w = draw.standard_normal((out, channels // groups, 3, 3)).astype(np.float32)
    packed = reference.block_conv_weights(w, groups, target.conv_lanes(out // groups))
    made = Kernel(target, lambda a, b: computes_float.conv2d(a, b, out_channels=out), x, packed)
    made.arrays = (x, packed)
    return made


def request(kernel: Kernel) -> TileRequest:
    found = search.request_of(kernel.mod["kernel"], kernel.target)
    assert found is not None
    return found


def other(kernel: Kernel) -> tuning.Record:
    """A record that says another tile is better."""
    default, tile = candidates(request(kernel), 2)
    return tuning.Record(default, tile, 2e-6, 1e-6, "seconds")


def results(kernel: Kernel, tiles) -> np.ndarray:
    tuned = Kernel.__new__(Kernel)
    tuned.__dict__ |= kernel.__dict__
    tuned.executable = emit.build(kernel.mod, kernel.target, tiles)
    return tuned(*kernel.arrays)


extents = st.integers(1, 61)


@st.composite
def requests(draw) -> TileRequest:
    groups, blocks, lanes = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.sampled_from([4, 8, 16]))
    outputs = groups * (blocks * lanes - draw(st.integers(0, lanes - 1)))
    images, height, width, steps = (draw(extents) for _ in range(4))
    shape = Shape(images, height, width, groups, blocks, lanes, outputs, steps, 4 * steps * groups * blocks * lanes)
    accumulators, weights = draw(st.integers(2, 31)), draw(st.integers(1, 2))
    chunk, most = draw(st.sampled_from([None, blocks])), draw(st.sampled_from([4, 64]))
    default = choose_tile(shape, accumulators, weights=weights, chunk=chunk, most_pixels=most)
    return TileRequest("kind", shape, default, accumulators, weights, chunk, most)


@given(requests(), st.integers(1, 30))
@settings(deadline=None, max_examples=200)
def test_candidates_fit_the_image_the_channels_and_the_registers(request, most):
    tiles = candidates(request, most)
    assert tiles[0] == request.default
    assert len(set(tiles)) == len(tiles) <= most
    shape = request.shape
    for tile in tiles[1:]:
        assert is_legal(request, tile)
        assert shape.height % tile.rows == 0 and tile.cols <= shape.width
        assert tile.vectors * (tile.rows * tile.cols + request.weights) <= request.accumulators + 3
        if request.chunk or shape.groups > 1:
            assert tile == request.default or shape.blocks % tile.vectors == 0


LANES = replace(
    native(), name="lanes", word_bits=8, popcount="bytes", vector_bits=128, max_lanes=8, masks=False, lane_bytes=16
)
ODD = {
    "binary": lambda: conv(native(), (2, 7, 15)),
    "one row": lambda: conv(native(), (1, 3, 13), 8, 33),
    "one pixel": lambda: conv(native(), (5, 3, 3), 33, 72),
    "channels that leave a rest": lambda: conv(native(), (1, 5, 9), 64, 80),
    "reduction in lanes": lambda: conv(LANES, (1, 6, 9), 128, 24),
    "pixels that share a vector": lambda: conv(LANES, (1, 6, 14), 64, 24),
    "float": lambda: float_conv(native(), (1, 8, 13), 5, 70),
    "groups": lambda: float_conv(native(), (1, 5, 9), 6, 96, groups=2),
    "groups of part of a vector": lambda: float_conv(native(), (1, 5, 9), 6, 42, groups=2),
}


@pytest.mark.parametrize("name", ODD)
def test_no_tile_changes_a_result(name):
    kernel = ODD[name]()
    expected = kernel(*kernel.arrays)
    rule = kernel.scheduled["kernel"].attrs[emit.SCHEDULED_BY]
    functions = {
        str(tile): emit.schedule(kernel.mod, kernel.target, lambda _, t=tile: t)["kernel"]
        for tile in candidates(request(kernel), 6)[1:]
    }
    assert len(functions) > 2 and {func.attrs[emit.SCHEDULED_BY] for func in functions.values()} == {rule}
    named = {f"k{n}": func.with_attr("global_symbol", f"k{n}") for n, func in enumerate(functions.values())}
    executable = emit.build_scheduled(tvm.IRModule(named), kernel.target)
    for name, tile in zip(named, functions, strict=True):
        result = aligned(np.full_like(expected, 77))
        executable[name](*map(aligned, kernel.arrays), result)
        np.testing.assert_array_equal(result.numpy(), expected, err_msg=tile)


def test_the_database_comes_back_as_it_was_written(tmp_path):
    kernel = conv(native())
    path = tmp_path / "deep" / "tuning.json"
    database = tuning.Database.read(path)
    database.add(native(), request(kernel), other(kernel))
    database.write()
    again = tuning.Database.read(path)
    assert again.tiles(native()).records == database.tiles(native()).records != {}
    assert again.tiles(RPI4).records == {}
    assert again.tiles(native())(request(kernel)) == other(kernel).best


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"best"', '"beast"'),
        lambda text: text.replace('"unit": "seconds"', '"unit": "days"'),
        lambda text: json.dumps({"format": 1, "targets": {"native": {"k": {"default": [1, 1, 0]}}}}),
        lambda text: "\0\udcff",
    ],
)
def test_a_damaged_database_is_refused_in_one_line(tmp_path, damage):
    kernel = conv(native())
    database = tuning.Database.read(tmp_path / "tuning.json")
    database.add(native(), request(kernel), other(kernel))
    database.write()
    (tmp_path / "tuning.json").write_text(damage(database.path.read_text()), errors="surrogateescape")
    with pytest.raises(BnnccError, match="no tuning database, or a damaged one; delete it") as error:
        tuning.Database.read(tmp_path / "tuning.json")
    assert "\n" not in str(error.value)


def test_a_record_decides_the_schedule():
    kernel = conv(native())
    record = other(kernel)
    tiles = tuning.RecordedTiles({tuning.kernel_key(request(kernel)): record})
    scheduled = emit.schedule(kernel.mod, native(), tiles)["kernel"].script()
    assert scheduled == emit.schedule(kernel.mod, native(), lambda _: record.best)["kernel"].script()
    assert scheduled != kernel.scheduled["kernel"].script()
    np.testing.assert_array_equal(results(kernel, tiles), kernel(*kernel.arrays))


def test_a_record_that_no_longer_fits_is_not_used():
    asked = request(conv(native()))
    key, default = tuning.kernel_key(asked), asked.default
    for record in (
        tuning.Record(Tile(9, 9, 9), default, 1.0, 1.0, "seconds"),  # the cost model answers otherwise now
        tuning.Record(default, Tile(3, 1, 1), 1.0, 0.5, "seconds"),  # three rows do not divide the image's four
        tuning.Record(default, Tile(2, 11, 8), 1.0, 0.5, "seconds"),  # no registers for that
    ):
        tiles = tuning.RecordedTiles({key: record})
        assert tiles(asked) == default and tiles.of(asked) is None


def test_other_kernels_have_other_records():
    asked = request(conv(native()))
    others = [request(conv(native(), image=(1, 6, 12))), request(conv(native(), out=64)), replace(asked, kind="other")]
    assert len({tuning.kernel_key(r) for r in (asked, *others)}) == 4


def test_only_another_tile_than_the_default_counts_for_cache_keys(tmp_path):
    kernel = conv(native())
    database = tuning.Database.read(None)
    empty = database.signature([native()])
    database.add(native(), request(kernel), replace(other(kernel), best=request(kernel).default))
    assert database.signature([native()]) == empty
    database.add(native(), request(kernel), other(kernel))
    assert database.signature([native()]) != empty
    assert database.signature([RPI4]) == empty


def run_search(kernel, path, seconds=0.01):
    database = tuning.Database.read(path)
    funcs, calls = {"a": kernel.mod["kernel"], "unused": kernel.mod["kernel"]}, {"a": 2}
    stages = []
    summary = search.tune(funcs, calls, kernel.target, database, seconds, lambda stage, *_: stages.append(stage))
    assert stages
    return summary, tuning.Database.read(path)


def test_a_search_ends_keeps_its_outcome_and_changes_no_result(tmp_path):
    kernel = conv(native())
    summary, database = run_search(kernel, tmp_path / "tuning.json")
    assert (summary.searched, summary.left, summary.unit) == (1, 0, "seconds")
    assert 0 < summary.after <= summary.before
    record = database.tiles(native()).of(request(kernel))
    assert record is not None and (record.best != record.default) == bool(summary.improved)
    np.testing.assert_array_equal(results(kernel, database.tiles(native())), kernel(*kernel.arrays))
    again, _ = run_search(kernel, tmp_path / "tuning.json")
    assert again.searched == 0


def test_what_another_machine_runs_cannot_be_tuned(tmp_path):
    alien = replace(get_target("x86-64-v2"), name="alien", features=("no_such_feature",))
    with pytest.raises(BnnccError, match="cannot tune for target alien: this machine cannot run its code"):
        search.check([native(), alien], tuning.Database.read(tmp_path / "tuning.json"))


def test_a_database_that_cannot_be_written_is_known_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "tuning.json"
    with pytest.raises(BnnccError, match=r"tuning\.json cannot be (read|written): Not a directory"):
        search.check([native()], tuning.Database.read(path))
    with pytest.raises(BnnccError, match="BNNCC_TUNING=off allows none"):
        search.check([native()], tuning.Database.read(None))


def test_arm_without_llvm_mca_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(mca.shutil, "which", lambda name: None)
    mca.tool.cache_clear()
    with pytest.raises(BnnccError, match="llvm-mca, which estimates what ARM code takes, is not installed: apt"):
        search.check([RPI4], tuning.Database.read(tmp_path / "tuning.json"))


needs_mca = pytest.mark.skipif(
    not any(map(shutil.which, ("llvm-mca", *(f"llvm-mca-{v}" for v in range(14, 31))))), reason="needs llvm-mca"
)


@needs_mca
@pytest.mark.parametrize("target", ["rpi5", "rpi4", "rpi3", "rpi4-32", "rpi3-32", "rpi2"])
@pytest.mark.parametrize(
    "made", [lambda t: conv(t, (1, 10, 10), 128, 64), lambda t: float_conv(t, (1, 10, 15), 16, 32)]
)
def test_arm_kernels_are_estimated(tmp_path, made, target):
    spec = get_target(target)
    kernel = made(spec)
    summary, database = run_search(kernel, tmp_path / "tuning.json")
    assert (summary.searched, summary.unit) == (1, "cycles")
    record = database.tiles(spec).of(request(kernel))
    shape = request(kernel).shape
    # The cores multiply or count at most two vectors of 16 bytes of weights in a cycle, for each pixel.
    assert record.before >= record.after >= shape.weight_bytes * shape.height * shape.width / 32


def test_assembly_is_read_with_labels_as_addresses():
    text = ".text\nf:\n\tmov x0, #1 // one\n.L1:\n\tcnt\tv0.16b, v1.16b\n\tb.ne\t.L1\n\tret\n"
    code = mca.read_assembly(text)
    assert [i.text for i in code] == ["mov x0, #1", "cnt v0.16b, v1.16b", "b.ne #0x4", "ret"]
    assert [[i.address for i in body] for body in mca.inner_loops(mca.basic_blocks(code))] == [[4, 8]]


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("cnt v2.16b, v2.16b", 16), ("cnt v2.8b, v2.8b", 8), ("fmla v0.4s, v1.4s, v2.s[1]", 16),
        ("fmla v0.2s, v1.2s, v2.s[1]", 8), ("sdot v0.4s, v1.16b, v2.16b", 16), ("smull v0.8h, v1.8b, v2.8b", 8),
        ("smlal2 v0.8h, v1.16b, v2.16b", 8), ("add v0.16b, v0.16b, v1.16b", 0), ("fmadd s0, s1, s2, s3", 0),
        ("vcnt.8 q8, q8", 16), ("vcnt.8 d8, d8", 8), ("vfma.f32 q8, q9, d0[1]", 16), ("vmull.s8 q8, d0, d1", 8),
        ("vadd.i8 q8, q8, q9", 0), ("vmla.i32 q8, q9, q10", 0),
    ],
)  # fmt: skip
def test_bytes_of_weights(text, taken):
    assert mca.Instruction(0, text).weight_bytes == taken
