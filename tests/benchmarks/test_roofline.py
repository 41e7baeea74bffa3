"""The roofline: which step works for which layer, and what bounds it."""

import pytest
from reports import LIMITS, layer, step, tensor, version

from benchmarks import roofline


def bounds(entry, isa="native"):
    return [roofline.bound(work, entry, LIMITS, isa) for work in roofline.work_of(entry)]


def test_a_step_that_computes_takes_its_operations_by_the_limit_of_their_kind():
    """Two operations to a multiply-accumulate; tensors of no size, so that memory takes no time."""
    steps = [step("xnor_conv2d", ["a"], [0]), step("conv2d+relu", ["b"], [0])]
    entry = version(steps, [tensor(0, 0)], [layer("a", 5_700_000), layer("b", 100_000, bits=32)])
    assert [b.seconds for b in bounds(entry)] == pytest.approx([2e-6, 2e-6])
    assert [b.memory for b in bounds(entry)] == [0, 0]


@pytest.mark.parametrize(
    ("bits", "isa", "gops"),
    [(2, "native", 5700 / 4), (4, "native", 400), (2, "x86-64-v3", 400), (32, "x86-64-v3", 100)],
)
def test_few_bits_go_by_planes_or_by_bytes_whichever_is_faster(bits, isa, gops):
    entry = version([step("plane_conv2d", ["a"], [0])], [tensor(0, 0)], [layer("a", 1_000_000, bits)])
    assert bounds(entry, isa)[0].compute == pytest.approx(2e6 / (1e9 * gops))


@pytest.mark.parametrize(("size", "rate"), [(1000, 100), (1 << 20, 100), ((1 << 20) + 1, 50), (33 << 20, 10)])
def test_activations_come_from_the_nearest_cache_that_holds_them_but_never_the_first(size, rate):
    """The faster of reading and copying: a bound must not be too high."""
    entry = version([step("max_pool2d", ["a"], [0])], [tensor(0, size)], [])
    assert bounds(entry)[0].memory == pytest.approx(size / (1e9 * rate))


@pytest.mark.parametrize(("weights", "rate"), [(1000, 100), (2 << 20, 50), (40 << 20, 10)])
def test_weights_come_from_where_all_weights_and_the_arena_fit(weights, rate):
    """A step reads 1000 bytes of them; how many others there are decides."""
    tensors = [tensor(0, 1000, "weights"), tensor(1, 0)]
    entry = version([step("dense", ["a"], [0, 1])], tensors, [layer("a", 1, bits=32)], weights=weights)
    assert bounds(entry)[0].memory == pytest.approx(1000 / (1e9 * rate))


def test_the_slower_of_computing_and_memory_bounds_a_step():
    steps = [step("dense", ["a"], [0]), step("dense", ["b"], [0])]
    entry = version(steps, [tensor(0, 100_000)], [layer("a", 10, bits=32), layer("b", 10**9, bits=32)])
    small, large = bounds(entry)
    assert small.seconds == small.memory > small.compute
    assert large.seconds == large.compute > large.memory


def test_a_layer_belongs_to_the_step_that_multiplies_not_to_the_one_that_pads_for_it():
    steps = [step("permute_dims+pad", ["a"], [0]), step("conv2d", ["a"], [0]), step("scale_shift", ["a"], [0])]
    works = roofline.work_of(version(steps, [tensor(0, 8)], [layer("a", 7)]))
    assert [sum(work.macs.values()) for work in works] == [0, 7, 0]


def test_a_module_that_runs_twice_has_a_step_for_each_time():
    steps = [step("conv2d", ["a"], [0]), step("conv2d", ["a"], [0])]
    works = roofline.work_of(version(steps, [tensor(0, 8)], [layer("a", 7), layer("a", 9)]))
    assert [sum(work.macs.values()) for work in works] == [7, 9]


def test_one_step_may_serve_several_layers():
    steps = [step("conv2d", ["a", "b"], [0])]
    (work,) = roofline.work_of(version(steps, [tensor(0, 8)], [layer("a", 7), layer("b", 9)]))
    assert sum(work.macs.values()) == 16


def test_a_layer_of_no_step_is_an_error():
    with pytest.raises(ValueError, match="no step computes layer c"):
        roofline.work_of(version([step("conv2d", ["a"], [0])], [tensor(0, 8)], [layer("c", 7)]))


def test_the_total_leaves_out_steps_that_only_move():
    """A pool computes, though it multiplies nothing; a concatenation moves."""
    steps = [step("concat", ["c"], [0]), step("max_pool2d", ["p"], [0]), step("conv2d", ["a"], [0])]
    entry = version(steps, [tensor(0, 100_000)], [layer("a", 1, bits=32)])
    total = roofline.total(roofline.work_of(entry), entry, LIMITS, "native")
    assert total == {"all": pytest.approx(2e-6), "layers": pytest.approx(1e-6)}


def test_every_product_of_a_real_network_has_its_step():
    from benchmarks import networks

    artifact, _ = networks.compiled("LeNet", *networks.build("LeNet"))
    (entry,) = artifact.manifest["versions"]
    works = roofline.work_of(entry)
    assert sum(sum(work.macs.values()) for work in works) == sum(row["macs"] for row in entry["layers"]) > 0
    assert all(work.macs for work in works if "conv2d" in work.op)
