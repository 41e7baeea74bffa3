"""The debug layers: what they print and draw, and that the data passes unchanged."""

import copy
import pickle
import subprocess
import sys

import bitorch.layers
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import bnncc.layers
from bnncc.layers import (
    InputGraphicalDebug,
    InputPrintDebug,
    QConv1d,
    QConv2d,
    ShapePrintDebug,
    WeightGraphicalDebug,
    WeightPrintDebug,
)
from bnncc.layers.config import config
from bnncc.runtime.errors import BnnccError


@pytest.fixture
def activated(monkeypatch):
    monkeypatch.setattr(config, "debug_activated", True)
    monkeypatch.setattr(bitorch.layers.config.config, "debug_activated", True)


def canvas(count):
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure, [axes.imshow([[0.0]], vmin=0, vmax=1) for axes in figure.subplots(1, count, squeeze=False)[0]]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("InputPrintDebug", (2, 3, "Here")),
        ("ShapePrintDebug", (3,)),
        ("WeightPrintDebug", (nn.Linear(4, 5), 2, 2, "Weights")),
        ("InputPrintDebug", ()),
    ],
)
def test_prints_what_bitorch_prints(activated, capsys, name, arguments):
    x = torch.randn(6, 4)
    printed = []
    for package in (bnncc.layers, bitorch.layers):
        layer = getattr(package, name)(*arguments)
        for _ in range(7):
            result = layer(x)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""
    assert torch.equal(result, x if name != "WeightPrintDebug" else arguments[0](x))


def test_is_silent_unless_activated(capsys):
    x = torch.randn(3, 2)
    assert InputPrintDebug()(x) is x
    assert ShapePrintDebug()(x) is x
    assert InputGraphicalDebug()(x) is x
    assert capsys.readouterr().out == ""


def test_weights_are_shown_as_the_layer_uses_them(activated, capsys):
    layer = WeightPrintDebug(QConv1d(1, 1, 3))
    layer(torch.randn(1, 1, 5))
    out = capsys.readouterr().out
    assert str(torch.sign(layer._debug_module.weight.detach())) in out


def test_a_scalar_is_printed(activated, capsys):
    InputPrintDebug()(torch.tensor(2.0))
    assert capsys.readouterr().out == "Debug : tensor(2.)\n"


def test_gradients_pass_through(activated, capsys):
    x = torch.randn(3, 2, requires_grad=True)
    InputPrintDebug()(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0]] * 3
    assert "grad_fn" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "filters"),
    [((2, 3), [(2, 3)]), ((2, 2, 3), [(1, 3)] * 3), ((2, 2, 4, 3), [(4, 3)] * 3), ((2, 1, 2, 4, 3), [(4, 3)] * 3)],
)
def test_draws_each_filter_scaled(activated, shape, filters):
    figure, images = canvas(3)
    blank = images[-1].get_array().copy()
    x = torch.randn(shape)
    assert InputGraphicalDebug(figure, images, num_outputs=3)(x) is x
    rows = x.reshape(-1, *filters[0])
    for image, pixels in zip(images, rows, strict=False):
        expected = (pixels - pixels.min()) / (pixels.max() - pixels.min())
        torch.testing.assert_close(torch.from_numpy(image.get_array().data), expected)
    if len(rows) < 3:
        assert (images[-1].get_array() == blank).all()


def test_a_constant_filter_is_drawn_as_zeros(activated):
    figure, images = canvas(1)
    layer = WeightGraphicalDebug(QConv2d(1, 1, 2), figure, images, num_outputs=1)
    nn.init.constant_(layer._debug_module.weight, 0.5)
    layer(torch.randn(1, 1, 3, 3))
    assert images[0].get_array().tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_wrong_images_are_refused(activated):
    with pytest.raises(ValueError, match=r"images \(2\) must match number of desired outputs \(10\)") as caught:
        InputGraphicalDebug(None, [1, 2])
    assert isinstance(caught.value, BnnccError)
    with pytest.raises(ValueError, match="InputGraphicalDebug has nothing to draw into"):
        InputGraphicalDebug()(torch.randn(2, 2))


def test_a_deep_copy_draws_into_the_same_figure_and_a_pickle_into_none(activated):
    figure, images = canvas(1)
    layer = WeightGraphicalDebug(nn.Linear(2, 2), figure, images, num_outputs=1)
    twin = copy.deepcopy(layer)
    assert twin._figure is figure and twin._images is images
    assert twin._debug_module.weight is not layer._debug_module.weight
    assert torch.equal(twin._debug_module.weight, layer._debug_module.weight)
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded._figure is None and loaded._images is None
    assert layer._figure is figure
    loaded.set_figure(figure)
    loaded.set_images(images)
    assert loaded(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("layer", [InputPrintDebug(1), ShapePrintDebug(1), WeightPrintDebug(QConv2d(1, 2, 1), 1)])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_survives_copying(layer, duplicate):
    x = torch.randn(1, 1, 2, 2)
    assert torch.equal(duplicate(layer)(x), layer(x))


def test_matplotlib_is_not_loaded_until_somebody_draws():
    program = "import sys, bnncc.layers; print([m for m in ('matplotlib', 'tvm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
