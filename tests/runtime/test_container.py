"""Files that are not what they should be: each is one clear line, and nothing of the file is executed."""

import hashlib
import shutil

import pytest

from bnncc import runtime
from bnncc.runtime import container, cpu
from bnncc.runtime.errors import ArtifactError, BnnccError, UnsupportedMachineError


def refusal(path, kind=ArtifactError):
    with pytest.raises(kind) as caught:
        runtime.load(path)
    assert isinstance(caught.value, BnnccError) and "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def changed(artifact, tmp_path):
    """Writes a changed copy of the artifact."""

    def write(change):
        path = tmp_path / "changed.so"
        path.write_bytes(change(artifact.read_bytes()))
        return path

    return write


def test_missing_file(tmp_path):
    assert refusal(tmp_path / "none.so").endswith("none.so: no such file")


def test_a_folder(tmp_path):
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def test_a_forbidden_file(artifact, tmp_path, monkeypatch):
    def forbid(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(container.os, "open", forbid)
    assert "cannot be opened: Permission denied" in refusal(artifact)


def test_other_files(changed, artifact):
    assert "the file is empty" in refusal(changed(lambda _: b""))
    assert "not a bnncc artifact" in refusal(changed(lambda _: b"PK\x03\x04" + bytes(5000)))
    without_trailer = artifact.read_bytes()[:-64]
    assert "no bnncc artifact, or truncated" in refusal(changed(lambda _: without_trailer))


@pytest.mark.parametrize("keep", [10, 30, 63, 64, 4096, 0.25, 0.5, 0.99])
def test_truncated(changed, keep):
    message = refusal(changed(lambda data: data[: int(keep * len(data)) if keep < 1 else keep]))
    assert "truncated" in message


def test_truncated_by_one_byte(changed):
    assert "truncated" in refusal(changed(lambda data: data[:-1]))


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def test_one_flipped_byte_anywhere(changed, artifact):
    size = artifact.stat().st_size
    places = sorted({*range(0, 64), *range(64, size, 997), *range(size - 64, size)})
    for at in places:
        refusal(changed(lambda data, at=at: flip(data, at)))


def test_one_flipped_byte_in_code_or_weights_is_called_altered(changed, artifact):
    for at in (17, 5000, artifact.stat().st_size // 2, artifact.stat().st_size - 60):
        assert "altered: its content does not match its SHA-256" in refusal(changed(lambda data, at=at: flip(data, at)))


def resealed(data, version):
    head = version.to_bytes(4, "little") + data[-60:-32]
    body = data[:-64] + head
    return body + hashlib.sha256(body).digest()


def test_other_format_versions(changed):
    assert "artifact format 99, this bnncc reads format 3; install a newer bnncc" in refusal(
        changed(lambda data: resealed(data, 99))
    )
    assert "artifact format 1, this bnncc reads format 3; compile the model again" in refusal(
        changed(lambda data: resealed(data, 1))
    )


def test_another_architecture(arm_artifact, arm32_artifact):
    message = refusal(arm_artifact, UnsupportedMachineError)
    assert "compiled for aarch64 (target aarch64), this machine is x86_64" in message
    message = refusal(arm32_artifact, UnsupportedMachineError)
    assert "compiled for arm (target armv7), this machine is x86_64" in message


def test_a_missing_cpu_feature(tiny, tmp_path, monkeypatch):
    path = tiny.build(tmp_path / "tiny.so")
    monkeypatch.setattr(cpu, "host_features", lambda: frozenset({"fpu", "sse2"}))
    message = refusal(path, UnsupportedMachineError)
    assert "compiled for target x86-64-v2, this CPU lacks sse4_2; compile with -t native" in message


def test_the_driver_too_refuses_a_missing_cpu_feature(tiny, tmp_path, monkeypatch):
    """For C programs, which do not pass Python's check."""
    import dataclasses

    from bnncc.targets.link import link

    machine = dataclasses.replace(tiny.X86, features=("sse4_2", "avx1024"))
    link([tiny.version(tiny.plan(), machine)], tmp_path / "tiny.so")
    monkeypatch.setattr(cpu, "host_features", lambda: None)
    with pytest.raises(BnnccError, match=r"tiny: this CPU lacks 'avx1024', which the artifact was compiled for"):
        runtime.load(tmp_path / "tiny.so")


def test_features_of_an_unknown_machine_are_not_checked(artifact, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "none")
    assert cpu.host_features() is None
    runtime.load(artifact).close()


@pytest.mark.parametrize(
    ("listed", "missing"),
    [
        ("half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm", None),
        ("fp asimd evtstrm crc32 cpuid", None),  # a 64-bit kernel under a 32-bit system
        ("half thumb fastmult vfp edsp neon vfpv3 tls vfpd32", "vfpv4"),  # a Cortex-A9
    ],
)
def test_features_of_32_bit_arm(tiny, tmp_path, monkeypatch, listed, missing):
    path = tiny.build(tmp_path / "tiny.so", tiny.ARM32)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nFeatures\t: {listed} \n")
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu, "host_architecture", lambda: "arm")
    manifest = runtime.read_manifest(path)
    if missing is None:
        cpu.check_machine(manifest, path)
    else:
        with pytest.raises(UnsupportedMachineError, match=rf"target armv7, this CPU lacks {missing}"):
            cpu.check_machine(manifest, path)


@pytest.mark.parametrize(
    ("machine", "bits", "architecture"),
    [
        ("x86_64", "64bit", "x86_64"),
        ("AMD64", "64bit", "x86_64"),
        ("aarch64", "64bit", "aarch64"),
        ("aarch64", "32bit", "arm"),
        ("armv7l", "32bit", "arm"),
        ("riscv64", "64bit", "riscv64"),
    ],
)
def test_host_architecture(monkeypatch, machine, bits, architecture):
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu.platform, "architecture", lambda: (bits, ""))
    assert cpu.host_architecture() == architecture


def test_a_copy_is_as_good(artifact, tmp_path):
    copy = shutil.copy(artifact, tmp_path / "other name.so")
    runtime.load(copy).close()


def test_write_whole_leaves_nothing_behind(tmp_path):
    path = tmp_path / "f"
    container.write_whole(path, b"old")
    with pytest.raises(ArtifactError, match=r"g/f: cannot be written: No such file or directory"):
        container.write_whole(tmp_path / "g" / "f", b"new")
    with pytest.raises(TypeError):
        container.write_whole(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]
