"""What the README promises, run as written."""

import re
import shutil
from pathlib import Path

import pytest

from bnncc.targets.descriptor import target_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="qemu-aarch64 is not installed")
def test_the_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("True\n") and "0 sign flips" in out
    assert {path.name for path in tmp_path.iterdir()} == {"model.so", "model.h", "model-run"}


def test_every_target_stands_in_the_table():
    table = README.split("## Targets")[1].split("##")[0]
    assert [name for name in target_names() if f"`{name}`" not in table] == []


def test_its_links_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).is_file(), link


def test_every_make_target_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"\bmake ([a-z]+)\b(?=`|  )", README)):
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
