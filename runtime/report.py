"""What a parity check found: numbers per step and overall, the verdict, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bnncc.runtime.container import write_whole
from bnncc.runtime.errors import BnnccError


@dataclass
class Difference:
    """Counts over all elements compared so far.

    mismatches: elements that differ in value (NaN equals NaN; −0 equals 0). In packed tensors these are sign flips.
    max_abs: the largest |device − eager|; infinite where one is finite and the other is not.
    max_rel: the largest |device − eager| over the largest finite |eager| of the same tensor.
    sum_abs: of |device − eager|.
    """

    elements: int = 0
    mismatches: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    sum_abs: float = 0.0

    @classmethod
    def between(cls, device: np.ndarray, eager: np.ndarray) -> Difference:
        """Of two arrays of equal shape."""
        differs = (device != eager) & ~((device != device) & (eager != eager))
        count = int(np.count_nonzero(differs))
        if not count:
            return cls(eager.size)
        a, b = device[differs].astype(np.float64), eager[differs].astype(np.float64)
        with np.errstate(invalid="ignore"):
            gaps = np.abs(a - b)
        gaps = np.where(np.isfinite(gaps), gaps, np.inf)
        largest = float(gaps.max())
        magnitudes = np.abs(eager[np.isfinite(eager)])
        scale = float(magnitudes.max()) if magnitudes.size else 0.0
        return cls(eager.size, count, largest, largest / scale if scale else float("inf"), float(gaps.sum()))

    def merge(self, other: Difference) -> None:
        """Adds the counts of another comparison."""
        self.elements += other.elements
        self.mismatches += other.mismatches
        self.max_abs = max(self.max_abs, other.max_abs)
        self.max_rel = max(self.max_rel, other.max_rel)
        self.sum_abs += other.sum_abs

    @property
    def mean_abs(self) -> float:
        return self.sum_abs / self.elements if self.elements else 0.0

    @property
    def share(self) -> float:
        return self.mismatches / self.elements if self.elements else 0.0


@dataclass
class StepParity:
    """One value of the model that one kernel call makes. `layers` are module paths.

    exact: the compiler promises bit-equality. packed: the value is bits.
    step: for quantized values the distance of two neighbours; the mismatches of an inexact step are then values that
        were rounded to the other side.
    downstream: some step before it, or itself, is inexact, so that in the whole run it may see other inputs than eager.
    opt_in: "int8", "tf32" or "float16" for a layer that is quantized because its user said so; `isolated` is then
        measured against the model with such layers quantized, and `cost` against eager.
    isolated: outputs when fed with eager's own inputs. whole: outputs in the whole run.
    low, high: the range of eager's values there and 0, for an opt-in.
    """

    index: int
    op: str
    layers: tuple[str, ...]
    exact: bool
    packed: bool
    downstream: bool
    step: float | None = None
    opt_in: str | None = None
    isolated: Difference = field(default_factory=Difference)
    whole: Difference = field(default_factory=Difference)
    cost: Difference = field(default_factory=Difference)
    low: float = 0.0
    high: float = 0.0

    def see(self, values: np.ndarray) -> None:
        """Widens the range of eager's values."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    @property
    def steps_off(self) -> tuple[float, float] | None:
        """How far an opt-in is from eager when fed with its inputs, at most and on average, in steps: the value's own
        where it is quantized, else 1/255 of eager's range. None for others, and where the value is bits."""
        unit = self.step or (self.high - self.low) / 255
        if self.opt_in is None or self.packed or not unit:
            return None
        return self.cost.max_abs / unit, self.cost.mean_abs / unit

    @property
    def name(self) -> str:
        """The module paths, or the operator for what belongs to no module."""
        return ", ".join(self.layers) or self.op

    def ok(self, tolerance: float) -> bool:
        """Whether the step alone does what it promises."""
        if self.exact:
            return self.isolated.mismatches == 0
        if self.step:
            # The distances of eager's own values vary by their rounding errors.
            return self.isolated.max_abs <= 1.001 * self.step or self.isolated.max_rel <= tolerance
        if self.packed:
            return self.isolated.mismatches <= max(1, tolerance * self.isolated.elements)
        return self.isolated.max_rel <= tolerance


@dataclass
class ParityReport:
    """The outcome of `bnncc.validate`.

    steps: in order of execution, those whose output is a value of the model.
    outputs: every output of every sample. traced: samples that were also checked step by step, of `samples`.
    top1_agreement, accuracy, eager_accuracy: shares in 0…1, or None without class scores or labels.
    problems: one line for each reason why the artifact is wrong; `ok` says that there are none.
    quantized_layers: module paths of those that their user opted in to quantize.
    """

    model: str
    target: str
    device: str
    samples: int = 0
    traced: int = 0
    steps: list[StepParity] = field(default_factory=list)
    outputs: Difference = field(default_factory=Difference)
    top1_agreement: float | None = None
    accuracy: float | None = None
    eager_accuracy: float | None = None
    tolerance: float = 0.0
    problems: list[str] = field(default_factory=list)
    quantized_layers: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def sign_flips(self) -> Difference:
        """Bits compared in the whole run, and those that differ."""
        packed = [step.whole for step in self.steps if step.packed]
        return Difference(sum(d.elements for d in packed), sum(d.mismatches for d in packed))

    @property
    def quantized(self) -> Difference:
        """Quantized values compared in the whole run, and those that differ."""
        found = Difference()
        for step in self.steps:
            if step.step:
                found.merge(step.whole)
        return found

    @property
    def first_flip(self) -> str | None:
        """The first layer whose bits differ in the whole run."""
        return next((step.name for step in self.steps if step.packed and step.whole.mismatches), None)

    @property
    def inexact_layers(self) -> list[str]:
        """The layers that may differ in the last bits because they sum floats in another order than eager."""
        return list(dict.fromkeys(step.name for step in self.steps if not step.exact and not step.opt_in))

    def summary(self) -> list[str]:
        """The findings, one line each."""
        exact = [step.isolated for step in self.steps if step.exact]
        wrong = sum(d.mismatches for d in exact)
        flips = self.sign_flips
        first = f", first in {self.first_flip}" if self.first_flip else ""
        lines = [
            f"{len(exact)} exact steps fed with eager's input: {wrong} mismatches in "
            f"{sum(d.elements for d in exact):,} elements ({_count(self.traced, 'sample')})",
            f"whole run: {flips.mismatches} sign flips in {flips.elements:,} bits ({_percent(flips.share)}){first}",
            f"outputs: {_count(self.samples, 'sample')}, largest difference {self.outputs.max_abs:.3g} "
            f"(relative {self.outputs.max_rel:.3g})",
        ]
        if self.quantized.elements:
            alone = sum(step.isolated.mismatches for step in self.steps if step.step)
            lines.insert(
                2,
                f"quantized values: {self.quantized.mismatches} of {self.quantized.elements:,} differ in the whole "
                f"run, {alone} when each step is fed with eager's input",
            )
        if self.top1_agreement is not None:
            lines.append(f"top-1 agreement: {_percent(self.top1_agreement)}")
        if self.accuracy is not None and self.eager_accuracy is not None:
            lines.append(f"accuracy: {_percent(self.accuracy)} (eager {_percent(self.eager_accuracy)})")
        lines += self._opt_in()
        if self.inexact_layers:
            lines.append(f"inexact by float summation order: {', '.join(self.inexact_layers)}")
        return lines

    def _opt_in(self) -> list[str]:
        """What an opt-in is and what it costs. Without it, every figure here would be eager's but for rounding."""
        if not self.quantized_layers:
            return []
        rows = [step for step in self.steps if step.opt_in]
        flips = self.sign_flips
        cost = [f"{_percent(flips.share)} of the signs flipped"] if flips.elements else []
        if self.top1_agreement is not None:
            cost.append(f"top-1 agreement {_percent(self.top1_agreement)}")
        if self.accuracy is not None and self.eager_accuracy is not None:
            cost.append(f"accuracy {_percent(self.accuracy)} instead of {_percent(self.eager_accuracy)}")
        if off := {self.layer(step): step.steps_off for step in rows if step.steps_off}:
            worst = max(off, key=lambda name: off[name][0])
            cost.append(
                f"a layer alone is off by at most {off[worst][0]:.2g} steps of 1/255 ({worst}), on average by "
                f"{max(mean for _, mean in off.values()):.2g}"
            )
        return [f"{rows[0].opt_in} by opt-in: {', '.join(self.quantized_layers)}", f"cost of that: {'; '.join(cost)}"]

    def layer(self, step: StepParity) -> str:
        """Which of the quantized layers a step computes."""
        return next((path for path in step.layers if path in self.quantized_layers), step.name)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; infinite differences are the string "inf", so that the result is strict JSON."""
        flips = self.sign_flips
        return _strict(
            {
                "ok": self.ok,
                **asdict(self),
                "sign_flips": {"bits": flips.elements, "flips": flips.mismatches, "first_layer": self.first_flip},
                "quantized": {"values": self.quantized.elements, "differ": self.quantized.mismatches},
                "inexact_layers": self.inexact_layers,
                "cost": {
                    self.layer(step): dict(zip(("max_steps", "mean_steps"), step.steps_off, strict=True))
                    for step in self.steps
                    if step.steps_off
                },
            }
        )

    def save(self, path: str | Path) -> None:
        """Writes `.json` or `.html`; raises BnnccError for another ending."""
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        elif path.suffix == ".html":
            text = self._html()
        else:
            raise BnnccError(f"cannot save a parity report as '{path.name}': the name must end in .json or .html")
        write_whole(path, text.encode())

    def table(self) -> Any:
        """A `rich.table.Table`, one row a step."""
        from rich.table import Table

        table = Table(title=self._title())
        for heading in self._columns():
            table.add_column(heading, justify="left" if heading in ("layer", "step") else "right")
        for cells, bad in self._rows():
            table.add_row(*cells, style="red" if bad else None)
        return table

    def _columns(self) -> list[str]:
        return [*_COLUMNS, *([_COST] if self.quantized_layers else [])]

    def _title(self) -> str:
        return f"{self.model} for {self.target} on {self.device}: {'ok' if self.ok else 'NOT EQUAL'}"

    def _rows(self) -> list[tuple[list[str], bool]]:
        rows = []
        for step in self.steps:
            isolated, whole = step.isolated, step.whole
            cells = [
                step.name,
                step.op,
                "exact" if step.exact else f"{step.opt_in} (opt-in)" if step.opt_in else "float sum",
                f"{isolated.mismatches}/{isolated.elements:,}",
                f"{isolated.max_abs:.2g}",
                f"{whole.mismatches}/{whole.elements:,}" if step.packed else "",
                "" if step.packed else f"{whole.max_abs:.2g}",
                "" if step.packed else f"{whole.max_rel:.2g}",
                "{:.2g} / {:.2g}".format(*step.steps_off) if step.steps_off else "",
            ]
            cells = cells if self.quantized_layers else cells[:-1]
            rows.append((cells, not step.ok(self.tolerance)))
        return rows

    def _html(self) -> str:
        import jinja2

        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(_PAGE).render(
            title=self._title(),
            ok=self.ok,
            lines=self.summary(),
            problems=self.problems,
            columns=self._columns(),
            rows=self._rows(),
        )


_COLUMNS = ["layer", "step", "kind", "wrong alone", "max abs", "flips in whole run", "max abs", "max rel"]
_COST = "off eager, steps: max / mean"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }
table { border-collapse: collapse } th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } .bad { color: #b00020 }
</style>
<h1{% if not ok %} class="bad"{% endif %}>{{ title }}</h1>
<ul>
{% for line in problems %}
<li class="bad">{{ line }}</li>
{% endfor %}
{% for line in lines %}
<li>{{ line }}</li>
{% endfor %}
</ul>
<table>
<tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for cells, bad in rows %}
<tr{% if bad %} class="bad"{% endif %}>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</html>
"""


def _percent(share: float) -> str:
    """Two decimals; never rounds a share that is not whole up to 100 % or down to 0 %."""
    percent = 100 * share
    if 0 < percent < 0.01:
        return f"{percent:.1e} %"
    return f"{min(percent, 99.99) if percent < 100 else 100:.2f} %"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
