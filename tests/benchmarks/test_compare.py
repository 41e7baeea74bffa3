"""Two results side by side, and the pictures and tables of one."""

import io
import json
import sys
import xml.etree.ElementTree as ElementTree

from reports import report
from rich.console import Console

from benchmarks import compare


def printed(renderable):
    console = Console(file=io.StringIO(), width=250)
    console.print(renderable)
    return console.file.getvalue()


def test_a_gain_is_above_one_whichever_direction_is_better():
    assert compare.gain(compare.Figure(2.0, False), compare.Figure(1.0, False)) == 2.0
    assert compare.gain(compare.Figure(2.0, True), compare.Figure(1.0, True)) == 0.5


def test_only_what_differs_is_shown_the_greatest_loss_first():
    before, after = report(), report()
    after["networks"]["QuickNet"]["median_ms"] = {"bnncc": 2.0}
    after["layers"]["3×3, 64→64 at 56²"]["kernel_us"] = 950.0
    after["networks"]["QuickNet"]["memory"]["arena_bytes"] = 1_041_000  # less than 3 %
    rows = [line for line in printed(compare.table(before, after, 1.03)).splitlines() if "│" in line]
    assert len(rows) == 2
    assert "networks/QuickNet: ms" in rows[0] and "0.500" in rows[0]
    assert "kernel µs" in rows[1] and "2.000" in rows[1]


def test_results_of_two_machines_compare_by_shares_and_ratios_alone():
    before, after = report(), report()
    after["machine"] = {"processor": "slide rule"}
    text = printed(compare.table(before, after, 1.0))
    assert "times as fast as LCE best" in text and "share of the roofline" in text
    assert "QuickNet: ms" not in text and "GOPS" not in text and "bytes" not in text


def test_what_one_result_lacks_is_left_out():
    before, after = report(), report()
    del after["networks"]
    assert "QuickNet" not in printed(compare.table(before, after, 1.0))


def test_the_command_reads_two_files(tmp_path, capsys, monkeypatch):
    before, after = report(), report()
    after["networks"]["QuickNet"]["median_ms"] = {"bnncc": 4.0}
    for name, data in (("before", before), ("after", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")])
    compare.main()
    assert "0.250" in capsys.readouterr().out


def test_every_section_has_a_table_with_its_items():
    from benchmarks import tables

    data = report()
    for section, make in tables.SECTIONS.items():
        text = "".join(printed(table) for table in make(data[section]))
        assert all(item in text for item in data[section]), section


def test_plots_are_drawn_of_what_there_is(tmp_path):
    from benchmarks import plot

    paths = plot.plots(report(), tmp_path / "abacus")
    assert [path.name for path in paths] == [
        "abacus-roofline-QuickNet.svg", "abacus-convolutions.svg", "abacus-networks.svg"
    ]  # fmt: skip
    for path in paths:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert plot.plots({"limits": {}, "networks": {}}, tmp_path / "nothing") == []
