"""Target names, and what a target asks of a machine."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from bnncc.runtime.errors import BnnccError
from bnncc.targets.descriptor import all_families, all_targets, get_target, get_targets, native, target_names


def test_every_listed_name_is_a_target() -> None:
    assert target_names()[0] == "native"
    families = {family.name: family for family in all_families()}
    assert families.keys() < set(target_names())
    for name in target_names():
        targets = get_targets(name)
        if name in families:
            assert tuple(target.name for target in targets) == families[name].members
        else:
            assert targets == (get_target(name),) and targets[0].name == name


def test_a_family_goes_from_the_most_demanding_target_to_the_least() -> None:
    for family in all_families():
        targets = family.targets()
        assert len({(target.arch, target.zig, target.zig_static) for target in targets}) == 1
        for one, next_one in itertools.pairwise(targets):
            assert set(one.features) > set(next_one.features)


def test_a_family_is_not_one_target() -> None:
    with pytest.raises(BnnccError, match="x86-64 stands for several targets: name one of icelake-server, x86-64-v4,"):
        get_target("x86-64")


def test_a_target_passes_through() -> None:
    assert get_target(native()) is native()


@pytest.mark.parametrize(
    ("typo", "meant"), [("rpi44", "rpi4"), ("x86-64-v33", "x86-64-v3"), ("natve", "native"), ("znvr4", "znver4")]
)
def test_a_typo_names_the_nearest_target(typo: str, meant: str) -> None:
    with pytest.raises(BnnccError, match=f"unknown target '{typo}': did you mean {meant}") as error:
        get_target(typo)
    assert "\n" not in str(error.value)


def test_processor_names_are_targets() -> None:
    zen = get_target("znver4")
    assert zen.arch == "x86_64"
    assert zen.word_bits == 32 and zen.popcount == "vector"
    assert "avx512_vpopcntdq" in zen.features
    skylake = get_target("skylake-avx512")
    assert skylake.vector_bits == 512 and skylake.popcount == "table"
    assert get_target("cortex-a76").arch == "aarch64"
    with pytest.raises(BnnccError):
        get_target("i386")


def test_features_are_spelt_as_the_kernel_spells_them() -> None:
    assert {"avx2", "bmi1", "fma", "abm"} <= set(get_target("x86-64-v3").features)
    assert "avx512f" not in get_target("x86-64-v3").features
    assert get_target("rpi4").features == ("fp", "asimd")


def test_in_order_cores_take_the_generic_schedule() -> None:
    assert get_target("rpi3").cpu == get_target("cortex-a53").cpu == "generic"
    assert get_target("rpi4").cpu == "cortex-a72"


def test_targets_are_values() -> None:
    for target in all_targets():
        assert hash(target) == hash(dataclasses.replace(target))
        with pytest.raises(dataclasses.FrozenInstanceError):
            target.name = "other"  # type: ignore[misc]


def test_lanes_follow_the_number_of_outputs() -> None:
    v3 = get_target("x86-64-v3")
    assert v3.conv_lanes(64) == 8
    assert v3.conv_lanes(5) == 8
    assert v3.conv_lanes(4) == 4
    assert v3.conv_lanes(1) == 1


def test_32_bit_arm() -> None:
    """Half the registers of AArch64, hard float, and processors of ARMv8 only where they are asked for."""
    for name in ("rpi2", "rpi3-32", "rpi4-32", "armv7"):
        target = get_target(name)
        assert (target.arch, target.registers, target.flushes_denormals) == ("arm", 16, True)
        assert target.tvm()["mfloat-abi"] == "hard"
        assert ("crc32" in target.features) == (name in ("rpi3-32", "rpi4-32"))
    assert not any(t.flushes_denormals for t in all_targets() if t.arch != "arm")
