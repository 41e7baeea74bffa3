"""The independent checker of the arena, and the processes that measure."""

from reports import step, tensor, version

from benchmarks import resources


def alive(steps, tensors):
    return resources.alive_bytes(version(steps, tensors, []))


def test_tensors_that_are_needed_at_the_same_time_add_up():
    """1 lives from the first to the third step, beside 2 and then 3."""
    steps = [step("a", [], [0, 1]), step("b", [], [1, 2]), step("c", [], [2, 1, 3]), step("d", [], [3, 4])]
    tensors = [
        tensor(0, 1000, "input"), tensor(1, 100, offset=0), tensor(2, 50, offset=128), tensor(3, 30, offset=192),
        tensor(4, 1000, "output"),
    ]  # fmt: skip
    assert alive(steps, tensors) == 180


def test_a_tensor_that_nothing_reads_any_more_is_dead():
    steps = [step("a", [], [0, 1]), step("b", [], [1, 2]), step("c", [], [2, 3])]
    assert alive(steps, [tensor(i, 100, offset=128 * i) for i in range(4)]) == 200


def test_a_result_that_overwrites_its_operand_counts_once():
    steps = [step("a", [], [0]), step("b", [], [0, 1]), step("c", [], [1])]
    assert alive(steps, [tensor(0, 100, offset=64), tensor(1, 80, offset=64)]) == 100


def test_weights_are_not_in_the_arena():
    assert alive([step("a", [], [0, 1])], [tensor(0, 500, "weights"), tensor(1, 40)]) == 40


def test_a_run_is_measured_in_a_process_without_torch(tmp_path):
    """The inputs and outputs, at the least, become resident; an import of torch alone would take 200 MB."""
    import torch

    from bnncc.compiler import compile as compile_model

    artifact = compile_model(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)).eval(), (torch.randn(1, 3, 300, 300),))
    path = artifact.save(tmp_path / "model.so")
    (entry,) = artifact.manifest["versions"]
    row = resources.running(path, entry)
    assert row["artifact_bytes"] == path.stat().st_size
    assert 3 * 300 * 300 * 4 < row["resident_bytes"] < 100_000_000
    assert row["alive_bytes"] <= row["arena_bytes"]
