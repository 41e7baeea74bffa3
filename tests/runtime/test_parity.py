"""The parity check on a small network made by hand: what it counts, and that it finds what is broken and says where."""

import json

import numpy as np
import pytest

from bnncc.runtime import parity
from bnncc.runtime.bits import BitLayout
from bnncc.runtime.errors import BnnccError
from bnncc.runtime.report import Difference, ParityReport

CHANNELS, CLASSES = 8, 3
LAYOUT = BitLayout.for_target(CHANNELS, 1, 8, 16)
PACKED = {**LAYOUT.to_json(), "padding": [1, 1, 1, 1], "pad_value": -1}
NHWC = [0, 2, 3, 1]

random = np.random.default_rng(0)
STEM = random.standard_normal((2, CHANNELS)).astype(np.float32)
WEIGHT = random.choice([-1.0, 1.0], (CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
HEAD = random.standard_normal((CHANNELS, CLASSES)).astype(np.float32)


def windows(padded):
    """[N, C, H, W] → [N, H', W', C, 3, 3]."""
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3)).transpose(0, 2, 3, 1, 4, 5)


class Eager:
    """stem: float 1×1 convolution; sign; conv: binary 3×3, padded by −1; norm: halves; pool; head: float linear."""

    def values(self, inputs, nodes=None):
        (x,) = inputs
        v = {"x": x, "stem": np.einsum("nchw,co->nohw", x, STEM)}
        v["sign"] = np.where(v["stem"] < 0, np.float32(-1), np.float32(1))
        padded = np.pad(v["sign"], ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1)
        v["conv"] = np.einsum("nhwcij,ocij->nohw", windows(padded), WEIGHT)
        v["norm"] = v["conv"] * np.float32(0.5)
        v["pool"] = v["norm"].max((2, 3))
        v["head"] = v["pool"] @ HEAD
        return {node: v[node] for node in nodes or v}

    def outputs(self, inputs):
        return [self.values(inputs)["head"]]


def conv_kernel(words):
    """The accumulator straight from bits, [N, H, W, O] int32."""
    values = np.where(LAYOUT.unpack(words), 1, -1).transpose(0, 3, 1, 2)
    return np.einsum("nhwcij,ocij->nhwo", windows(values), WEIGHT.astype(int)).astype(np.int32)


def pack_kernel(stem):
    return LAYOUT.pack(np.pad(~(stem < 0), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=False))


# name, op, function, arguments, output, module path, exact. `conv` writes scratch memory: it stands for no value.
STEPS = [
    ("stem", "conv2d", lambda x: np.einsum("nchw,co->nhwo", x.astype(np.float64), STEM), ["x"], "stem", "stem", False),
    ("pack", "pack", pack_kernel, ["stem"], "sign", "block.0", True),
    ("conv", "xnor_conv2d", conv_kernel, ["sign"], "accumulator", "block.0", True),
    ("norm", "scale_shift", lambda a: a * np.float32(0.5), ["accumulator"], "norm", "block.1", True),
    ("pool", "max_pool2d", lambda a: a.max((1, 2)), ["norm"], "pool", "pool", True),
    ("head", "dense", lambda a: a.astype(np.float64) @ HEAD, ["pool"], "head", "head", False),
]
# The arena reuses memory: `accumulator` lies over `stem`, which nobody reads any more.
TENSORS = {
    "x": ([1, 2, 4, 4], "float32", "input", 0, {"node": "x", "order": None, "bits": None}),
    "stem": ([1, 4, 4, CHANNELS], "float32", "arena", 0, {"node": "stem", "order": NHWC, "bits": None}),
    "sign": ([1, 6, 6, LAYOUT.words], "uint8", "arena", 1024, {"node": "sign", "order": NHWC, "bits": PACKED}),
    "accumulator": ([1, 4, 4, CHANNELS], "int32", "arena", 0, None),
    "norm": ([1, 4, 4, CHANNELS], "float32", "arena", 1024, {"node": "norm", "order": NHWC, "bits": None}),
    "pool": ([1, CHANNELS], "float32", "arena", 0, {"node": "pool", "order": None, "bits": None}),
    "head": ([1, CLASSES], "float32", "output", 0, {"node": "head", "order": None, "bits": None}),
}
IDS = {name: index for index, name in enumerate(TENSORS)}


def manifest():
    tensors = [
        {
            "id": IDS[name],
            "name": name,
            "shape": shape,
            "dtype": dtype,
            "space": space,
            "offset": offset,
            "value": value,
        }
        for name, (shape, dtype, space, offset, value) in TENSORS.items()
    ]
    steps = [
        {
            "kernel": name,
            "op": op,
            "args": [*map(IDS.get, args), IDS[out]],
            "outputs": 1,
            "layers": [path],
            "exact": exact,
        }
        for name, op, _, args, out, path, exact in STEPS
    ]
    port = {"name": "x", "shape": [1, 2, 4, 4], "dtype": "float32", "order": None}
    output = {"name": "output", "shape": [1, CLASSES], "dtype": "float32", "order": None}
    version = {
        "name": "fake",
        "tensors": tensors,
        "steps": steps,
        "inputs": [IDS["x"]],
        "outputs": [IDS["head"]],
    }
    return {"name": "tiny", "target": "fake", "inputs": [port], "outputs": [output], "versions": [version]}


class FakeDevice:
    """Runs STEPS in NumPy over byte memory. faults: step name → function that spoils the step's output."""

    def __init__(self, **faults):
        self.manifest = manifest()
        (self.version,) = self.manifest["versions"]
        self.memory = {space: np.zeros(4096, np.uint8) for space in ("input", "output", "arena")}
        self.faults = faults

    def _at(self, id_):
        tensor = self.version["tensors"][id_]
        size = int(np.prod(tensor["shape"])) * np.dtype(tensor["dtype"]).itemsize
        raw = self.memory[tensor["space"]][tensor["offset"] : tensor["offset"] + size]
        return raw.view(tensor["dtype"]).reshape(tensor["shape"])

    def write(self, tensor_id, array):
        assert array.shape == self._at(tensor_id).shape and array.dtype == self._at(tensor_id).dtype
        self._at(tensor_id)[...] = array

    def read(self, tensor_id):
        return self._at(tensor_id).copy()

    def run_steps(self, first, count):
        for name, _, kernel, args, out, *_ in STEPS[first : first + count]:
            result = np.array(kernel(*[self.read(IDS[arg]) for arg in args])).astype(TENSORS[out][1])
            if name in self.faults:
                self.faults[name](result)
            self.write(IDS[out], result)

    def run(self, inputs):
        self.write(IDS["x"], inputs[0])
        self.run_steps(0, len(STEPS))
        return [self.read(IDS["head"])]


def samples(count=6):
    return np.random.default_rng(1).standard_normal((count, 2, 4, 4)).astype(np.float32)


def check(device=None, inputs=None, **options):
    return parity.check(device or FakeDevice(), Eager(), [samples()] if inputs is None else inputs, **options)


def row(report, name):
    return next(step for step in report.steps if step.name == name)


def test_a_right_artifact_passes_and_everything_is_counted():
    report = check(layer_batches=None)
    assert report.ok and report.problems == []
    assert (report.samples, report.traced) == (6, 6)
    assert [step.name for step in report.steps] == ["stem", "block.0", "block.1", "pool", "head"]
    assert report.inexact_layers == ["stem", "head"]
    assert row(report, "block.0").isolated.elements == 6 * 16 * CHANNELS
    assert report.sign_flips.elements == 6 * 16 * CHANNELS and report.sign_flips.mismatches == 0
    assert row(report, "block.1").isolated == Difference(6 * 16 * CHANNELS)
    assert 0 < report.outputs.max_rel < 1e-5
    assert report.top1_agreement == 1.0


def test_accuracy_of_both_against_labels():
    expected = Eager().outputs([samples()])[0].argmax(-1)
    labels = expected.copy()
    labels[0] = (labels[0] + 1) % CLASSES
    report = check(labels=labels)
    assert report.accuracy == report.eager_accuracy == pytest.approx(5 / 6)


def flip_bit(words):
    words[0, 2, 2, 0] ^= 4


def test_one_flipped_bit_fails_and_names_the_layer():
    report = check(FakeDevice(pack=flip_bit), [samples(4)])
    assert not report.ok
    assert report.problems[0].startswith("block.0 (pack): 4 of 512 bits wrong when fed with eager's own input")
    assert report.first_flip == "block.0" and report.sign_flips.mismatches == 4
    # Everything after the fault is right when fed with eager's input.
    assert [step.name for step in report.steps if not step.ok(report.tolerance)] == ["block.0"]


def off_by_two(accumulator):
    accumulator[0, 0, 0, 0] += 2


def test_a_wrong_accumulator_is_blamed_on_the_step_that_makes_a_value_of_it():
    report = check(FakeDevice(conv=off_by_two))
    assert [problem.split(":")[0] for problem in report.problems] == ["block.1 (scale_shift)"]


def spoil_border(words):
    words[0, 0, 0, 0] |= 1


def test_a_wrong_padding_pixel_is_found_though_no_value_differs():
    report = check(FakeDevice(pack=spoil_border), [samples(4)])
    assert report.problems[0].startswith("block.0 (pack): 4 of 512 bits wrong")


def slightly(result):
    result *= 1 + 1e-3


def test_an_inexact_step_beyond_summation_order_fails():
    report = check(FakeDevice(head=slightly))
    assert [problem.split(":")[0] for problem in report.problems] == ["head (dense)"]


def test_a_flip_after_an_inexact_step_is_reported_and_not_blamed():
    """The stem's rounding may turn a sign; every step is still right on eager's input."""
    inputs = samples(1)
    inputs[0, :, 0, 0] = 0.0  # stem gives exactly 0 there, and +1

    def nudge(stem):
        stem[0, 0, 0, 0] = -1e-7

    report = check(FakeDevice(stem=nudge), [inputs])
    assert report.ok
    assert report.sign_flips.mismatches == 1 and report.first_flip == "block.0"


def test_a_batch_beyond_the_first_few_is_traced_when_its_outputs_differ():
    class LateFault(FakeDevice):
        runs = 0

        def run(self, inputs):
            self.runs += 1
            if self.runs == 6:
                self.faults["pack"] = flip_bit
            return super().run(inputs)

    report = check(LateFault(), layer_batches=1)
    assert report.traced == 2
    assert report.problems[0].startswith("block.0 (pack): 1 of 256 bits wrong")


def test_outputs_that_differ_without_a_flip_are_a_problem():
    class OtherRun(FakeDevice):
        """Right step by step, wrong in one go, as after a bad memory plan."""

        def run(self, inputs):
            return [super().run(inputs)[0] + 1]

    report = check(OtherRun())
    assert len(report.problems) == 1 and report.problems[0].startswith("outputs: wrong by")


# A layer that its user opted in to quantize: the head, with weights of a few bits.
HEAD_INT8 = (np.round(HEAD * 8) / 8).astype(np.float32)


class QuantizedHead(FakeDevice):
    def __init__(self, **faults):
        super().__init__(**faults)
        self.version["steps"][-1] |= {"exact": False, "opt_in": "int8"}
        self.manifest |= {"float_layers": "int8", "quantized": [{"layer": "head", "path": "head", "low": 0, "high": 9}]}

    def run_steps(self, first, count):
        super().run_steps(first, count)
        if first + count == len(STEPS):
            result = (self.read(IDS["pool"]) @ HEAD_INT8).astype(np.float32)
            if "head" in self.faults:
                self.faults["head"](result)
            self.write(IDS["head"], result)


class Intended(Eager):
    def values(self, known, nodes):
        values = dict(known) if "pool" in known else super().values([known["x"]])
        values["head"] = values["pool"] @ HEAD_INT8
        return {node: values[node] for node in nodes}

    def outputs(self, inputs):
        return [self.values({"x": inputs[0]}, {"head"})["head"]]


def test_an_opt_in_is_held_to_what_it_says_and_its_distance_from_eager_is_reported():
    report = check(QuantizedHead(), intended=Intended())
    assert report.problems == []
    assert report.inexact_layers == ["stem"] and report.quantized_layers == ["head"]
    head = row(report, "head")
    pool = Eager().values([samples()])["pool"]
    expected = np.abs(pool @ HEAD_INT8 - pool @ HEAD)[:4]  # four samples are looked at step by step
    unit = (head.high - head.low) / 255
    assert head.isolated.max_rel < 1e-6 < head.cost.max_rel
    assert head.steps_off == pytest.approx((expected.max() / unit, expected.mean() / unit), rel=1e-4)
    assert [step.name for step in report.steps if step.steps_off] == ["head"]
    text = "\n".join(report.summary())
    assert "int8 by opt-in: head" in text and "a layer alone is off by at most" in text
    assert report.to_json()["cost"]["head"]["max_steps"] == head.steps_off[0]


def test_an_opt_in_excuses_nothing_else():
    report = check(QuantizedHead(head=slightly), intended=Intended())
    assert [problem.split(":")[0] for problem in report.problems] == ["head (dense)"]
    report = check(QuantizedHead(pack=flip_bit), [samples(4)], intended=Intended())
    assert report.problems[0].startswith("block.0 (pack): 4 of 512 bits wrong")
    head = report.steps[-1]
    assert head.ok(report.tolerance)

    class OtherRun(QuantizedHead):
        def run(self, inputs):
            return [super().run(inputs)[0] + 1]

    assert check(OtherRun(), intended=Intended()).problems[0].startswith("outputs: wrong by")


def test_an_opt_in_needs_to_know_what_is_intended():
    with pytest.raises(BnnccError, match="the artifact has quantized layers"):
        check(QuantizedHead())


def test_nan_equals_nan_and_nothing_else():
    difference = Difference.between(np.array([np.nan, np.nan, 1.0]), np.array([np.nan, 2.0, 1.0]))
    assert (difference.mismatches, difference.max_abs) == (1, float("inf"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no inputs to compare on"),
        ([samples().astype(np.float64)], "'x' is float32, but float64 was given"),
        ([samples()[:0]], r"shape \(1, 2, 4, 4\).*but \(0, 2, 4, 4\) was given"),
        ([samples()[:, :1]], r"but \(6, 1, 4, 4\) was given"),
        ([(samples(), samples())], "has 1 inputs, but 2 arrays"),
    ],
)
def test_inputs_that_do_not_fit_are_one_clear_line(inputs, message):
    with pytest.raises(BnnccError, match=message) as caught:
        check(inputs=inputs)
    assert "\n" not in str(caught.value)


def test_labels_that_do_not_fit():
    with pytest.raises(BnnccError, match="5 labels were given for 6 samples"):
        check(labels=range(5))


def test_a_reference_of_another_shape():
    class Wider(Eager):
        def outputs(self, inputs):
            return [np.zeros((1, CLASSES + 1), np.float32)]

    with pytest.raises(BnnccError, match="not the model that was compiled"):
        parity.check(FakeDevice(), Wider(), [samples()])


def test_progress_reaches_the_end():
    calls = []
    check(progress=lambda *call: calls.append(call))
    assert calls[0] == ("comparing with eager", 0, 6) and calls[-1] == ("comparing with eager", 6, 6)


def test_report_as_json(tmp_path):
    path = tmp_path / "report.json"
    check(FakeDevice(head=lambda result: result.fill(np.nan)), [samples(4)]).save(path)
    data = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["ok"] is False and data["steps"][-1]["isolated"]["max_abs"] == "inf"
    assert data["sign_flips"] == {"bits": 512, "flips": 0, "first_layer": None}


def test_report_as_html_escapes_names(tmp_path):
    report = check(FakeDevice(pack=flip_bit))
    report.steps[0].layers = ("<b>stem</b>",)
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "NOT EQUAL" in text and "&lt;b&gt;stem" in text and "<b>stem" not in text


def test_report_refuses_other_endings(tmp_path):
    with pytest.raises(BnnccError, match=r"report.txt.*\.json or \.html"):
        check().save(tmp_path / "report.txt")
    assert list(tmp_path.iterdir()) == []


def test_report_as_table():
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(check().table())
    text = console.export_text()
    assert "tiny for fake on local: ok" in text and "block.0" in text and "0/512" in text


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100.00 %"), (0.99999, "99.99 %"), (0.0, "0.00 %"), (1e-6, "1.0e-04 %"), (0.5, "50.00 %")]
)
def test_shares_are_never_rounded_to_perfect(share, text):
    report = ParityReport("m", "t", "local", top1_agreement=share)
    assert f"top-1 agreement: {text}" in report.summary()
