"""Demands against figures."""

import pytest
from reports import report

from benchmarks import claims


def found(data):
    return {(claim.item, claim.what): claim for claim in claims.claims(data)}


def test_every_demand_on_the_sections_has_a_claim():
    """Kernels: 2 shapes, 2 builds of 2 each. Convolutions: 3 peers. Layers: 2. Networks: 2 peers, roofline, threads,
    3 of memory, 3 of compiling."""
    all_claims = claims.claims(report())
    assert len(all_claims) == 2 + 4 + 3 + 2 + 10
    assert all(claim.holds for claim in all_claims), [claim for claim in all_claims if not claim.holds]


@pytest.mark.parametrize(
    ("place", "value", "claim"),
    [
        (("kernels", "3×3, 28²×128", "native", "share_of_limit"), 0.89, "kernel, share of the limit"),
        (("kernels", "1×1, 28²×128", "native", "share_of_limit"), 0.69, "kernel, share of the limit"),
        (("kernels", "3×3, 28²×128", "x86-64-v3", "gops"), 1099.0, "slowest 3×3 kernel, GOPS"),
        (("kernels", "3×3, 28²×128", "x86-64-v2", "gops"), 549.0, "slowest 3×3 kernel, GOPS"),
        (("convolutions", "28²×128", "times_faster", "ORT int8"), 4.1, "artifact, times as fast as ORT int8"),
        (("convolutions", "28²×128", "times_faster", "LCE best"), 14.9, "artifact, times as fast as LCE best"),
        (("layers", "3×3, 64→64 at 56²", "share_of_bound"), 0.89, "kernel, share of the FMA limit"),
        (("layers", "3×3, 64→64 at 56²", "times_faster", "ORT fp32"), 0.99, "layer, times as fast as ORT fp32"),
        (("networks", "QuickNet", "times_faster", "LCE best"), 5.9, "times as fast as LCE best"),
        (("networks", "QuickNet", "roofline", "share"), 0.69, "share of the roofline"),
        (("networks", "QuickNet", "threads", "ratio"), 1.79, "two threads, times as fast as one"),
        (("networks", "QuickNet", "memory", "arena_bytes"), 1_060_000, "arena / most alive at once"),
        (("networks", "QuickNet", "memory", "artifact_bytes"), 4_401_000, "artifact beside its weights, KB"),
        (("networks", "QuickNet", "memory", "resident_bytes"), 15_500_000, "resident beside artifact and arena, MB"),
        (("networks", "QuickNet", "compile", "seconds"), 31.0, "compiled in, s"),
        (("networks", "QuickNet", "compile", "peak_mb"), 3001.0, "compiled within, MB"),
        (("networks", "QuickNet", "compile", "second_seconds"), 7.6, "compiled again, s"),
    ],
)
def test_a_figure_beyond_its_demand_fails_and_nothing_else(place, value, claim):
    data = report()
    *path, last = place
    target = data
    for key in path:
        target = target[key]
    target[last] = value
    assert [broken.what for broken in claims.claims(data) if not broken.holds] == [claim]


def test_without_vpopcntdq_builds_are_held_to_their_own_limit_only():
    data = report()
    data["limits"] = {
        **data["limits"],
        "arithmetic": {
            isa: {**kinds, "binary": {**kinds["binary"], "mix": "binary_carry_save_3"}}
            for isa, kinds in data["limits"]["arithmetic"].items()
        },
    }
    builds = [what for item, what in found(data) if item.startswith("build")]
    assert builds == ["slowest 3×3 kernel, share of its limit"] * 2


def test_a_peer_that_is_missing_has_no_claim():
    data = report()
    del data["networks"]["QuickNet"]["times_faster"]["LCE best"]
    assert ("QuickNet", "times as fast as LCE best") not in found(data)
    assert ("QuickNet", "times as fast as ORT fp32") in found(data)


def test_the_json_says_what_was_demanded_and_whether_it_holds():
    claim = claims.Claim("a", "b", measured=2.0, demanded=1.0, at_least=False)
    assert claim.to_json() == {
        "item": "a", "what": "b", "measured": 2.0, "demanded": 1.0, "at_least": False, "holds": False,
    }  # fmt: skip
