"""Names, module paths, inputs and outputs of imported models, and what a model that cannot be compiled is told."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from tvm import relax

from bnncc.dialect.torch_eval import evaluate_function
from bnncc.frontends.imported import ORIGINS_ATTR, ExportError, UnsupportedOperator
from bnncc.frontends.torch import export_model, supported_operators, to_relax
from bnncc.runtime.errors import BnnccError


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(torch.sign(x) == 0, torch.tensor(1.0), torch.sign(x))

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _BinaryConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(F.pad(_Sign.apply(x), (1, 1, 1, 1), value=-1.0), _Sign.apply(self.weight))


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = _BinaryConv(), nn.BatchNorm2d(4), nn.PReLU(4)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x)


class _Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(_Block(), _Block())
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        with torch.no_grad():
            scale = x.abs().mean()
        return self.head(F.adaptive_avg_pool2d(self.layer1(x) * scale, 1).flatten(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return _Network().eval(), torch.randn(2, 3, 8, 8)


def _function(body, *inputs):
    class Model(nn.Module):
        def forward(self, *args):
            return body(*args)

    return export_model(Model().eval(), inputs)


X = torch.randn(2, 4, 6, 6)


def test_every_variable_is_a_value_of_its_node(network):
    model, x = network
    program = export_model(model, (x,))
    imported = to_relax(program)
    nodes = {node.name: node for node in program.graph.nodes}
    eager = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            eager[node.name] = super().run_node(node)
            return eager[node.name]

    held = {**program.state_dict, **program.constants}
    arguments = [held.get(spec.target, x) for spec in program.graph_signature.input_specs]
    Recorder(program.graph_module).run(*arguments)

    function = imported.mod["main"]
    for block in function.body.blocks:
        for binding in block.bindings:
            name = binding.var.name
            node, path = imported.origins[name]
            assert path in {module for module, _ in model.named_modules()}
            if not node:
                assert name.rsplit("__", 1)[0] in nodes
            elif isinstance(binding.var.ty, relax.TensorType):
                assert name == node
                assert tuple(int(extent) for extent in binding.var.ty.shape) == tuple(eager[node].shape)
    torch.testing.assert_close(evaluate_function(function, [x])[0], model(x), rtol=1e-6, atol=1e-6)


def test_module_paths_survive(network):
    model, x = network
    imported = to_relax(export_model(model, (x,)))
    assert imported.origins["convolution"] == ("convolution", "stem")
    assert imported.origins["convolution__1"] == ("", "stem")
    assert imported.origins["convolution_1"] == ("convolution_1", "layer1.0.conv")
    assert imported.origins["getitem_5"] == ("getitem_5", "layer1.1.norm")
    assert imported.origins["addmm"] == ("addmm", "head")
    assert imported.origins["mean"] == ("mean", "")
    assert imported.origins["x"] == ("x", "")
    table = imported.mod["main"].attrs[ORIGINS_ATTR]
    assert {name: tuple(origin) for name, origin in table.items()} == imported.origins
    assert "layer1.0.conv" in imported.mod.script()


def test_export_is_deterministic_and_repeatable(network, tmp_path):
    model, x = network
    first = export_model(model, (x,))
    names = [node.name for node in first.graph.nodes]
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    with torch.no_grad():
        others = [
            export_model(copy.deepcopy(model), x),
            export_model(first),
            export_model(torch.export.load(tmp_path / "model.pt2")),
        ]
    for other in others:
        assert [node.name for node in other.graph.nodes] == names
        assert to_relax(other).origins == to_relax(first).origins


def test_export_leaves_the_model_alone(network):
    model, x = network
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    to_relax(export_model(model, (x,)))
    assert not model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_inputs_and_outputs_keep_order_and_names():
    class Model(nn.Module):
        def forward(self, image, mask, unused):
            masked = torch.where(mask, image, 0.0)
            return {"features": masked, "parts": [masked.sum(), image]}, mask

    inputs = (X, X > 0, torch.tensor([1, 2]))
    imported = to_relax(export_model(Model().eval(), inputs))
    assert [(port.name, port.shape, port.dtype) for port in imported.inputs] == [
        ("image", (2, 4, 6, 6), "float32"),
        ("mask", (2, 4, 6, 6), "bool"),
        ("unused", (2,), "int64"),
    ]
    assert [(port.name, port.shape) for port in imported.outputs] == [
        ("output_0_features", (2, 4, 6, 6)),
        ("output_0_parts_0", ()),
        ("output_0_parts_1", (2, 4, 6, 6)),
        ("output_1", (2, 4, 6, 6)),
    ]
    (features, sums), mask = Model()(*inputs)[0].values(), Model()(*inputs)[1]
    results = evaluate_function(imported.mod["main"], inputs)
    assert all(map(torch.equal, results, [features, *sums, mask]))


def test_a_single_output_is_called_output():
    assert [port.name for port in to_relax(_function(torch.relu, X)).outputs] == ["output"]


def test_a_constant_can_be_an_output():
    weight = nn.Parameter(torch.ones(3))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x + 1, self.weight

    imported = to_relax(export_model(Model().eval(), (torch.zeros(3),)))
    assert torch.equal(evaluate_function(imported.mod["main"], [torch.zeros(3)])[1], weight)


@pytest.mark.parametrize(
    "body",
    [
        F.silu,
        F.hardswish,
        F.hardsigmoid,
        F.relu6,
        F.leaky_relu,
        F.gelu,
        F.softsign,
        torch.square,
        lambda x: torch.clamp(x, min=0),
        lambda x: torch.rsub(x, 1),
        lambda x: F.prelu(x, torch.linspace(-1, 1, 4)),
        lambda x: x.square().mean((1, 2), keepdim=True),
        lambda x: F.channel_shuffle(x, 2),
        lambda x: x.unflatten(1, (2, 2)),
    ],
)
def test_decomposition_is_bit_equal_to_eager(body):
    imported = to_relax(_function(body, X))
    assert torch.equal(evaluate_function(imported.mod["main"], [X])[0], body(X))


def _error(build):
    """The message of the error a user sees: one line, and nothing of a traceback in it."""
    with warnings.catch_warnings(), pytest.raises(BnnccError) as caught:
        warnings.simplefilter("ignore")
        build()
    message = str(caught.value)
    assert "\n" not in message
    return caught.value, message


class _Holder(nn.Module):
    """A model whose sub-module `part` is the one to blame."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) + 1


def test_unsupported_operators_are_all_named_with_their_modules():
    class Part(nn.Module):
        def forward(self, x):
            return torch.cumsum(torch.digamma(x), 1)

    error, message = _error(lambda: to_relax(export_model(_Holder(Part()).eval(), (X,))))
    assert isinstance(error, UnsupportedOperator)
    assert message.startswith("cannot compile digamma.default (module 'part'), cumsum.default (module 'part'): ")
    assert f"{len(supported_operators())} ATen operators are supported" in message


def test_unsupported_use_of_a_supported_operator():
    part = nn.AvgPool2d(2, divisor_override=3)
    _, message = _error(lambda: to_relax(export_model(_Holder(part).eval(), (torch.randn(1, 4, 2, 2),))))
    assert message == (
        "cannot compile avg_pool2d.default in module 'part': divisor_override; leave it out and scale the result"
    )


def test_custom_operators_are_named_with_their_namespace():
    @torch.library.custom_op("bnncc_test::relu", mutates_args=())
    def relu(x: torch.Tensor) -> torch.Tensor:
        return x.relu()

    relu.register_fake(torch.empty_like)
    _, message = _error(lambda: to_relax(_function(relu, X)))
    assert "bnncc_test::relu.default (the model's own forward)" in message


def test_indices_of_a_max_pool():
    _, message = _error(lambda: to_relax(_function(lambda x: F.max_pool2d(x, 2, return_indices=True)[1], X)))
    assert "output 1 of max_pool2d_with_indices.default" in message


def test_training_mode():
    _, message = _error(lambda: export_model(nn.BatchNorm2d(4), (X,)))
    assert message == "the model is in training mode: call model.eval() before compiling"
    model = _Holder(nn.Dropout()).eval()
    model.part.train()
    _, message = _error(lambda: export_model(model, (X,)))
    assert message.startswith("module 'part' is in training mode")


def test_active_dropout():
    _, message = _error(lambda: to_relax(_function(lambda x: F.dropout(x, 0.5, training=True), X)))
    assert "dropout is active" in message


def test_program_exported_in_training_mode():
    program = torch.export.export(_Holder(nn.BatchNorm2d(4)).train(), (X,))
    _, message = _error(lambda: to_relax(export_model(program)))
    assert "buffer 'part.running_mean'" in message


def test_changed_buffers_and_inputs():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count += 1
            return x + self.count

    _, message = _error(lambda: to_relax(export_model(Counter().eval(), (X,))))
    assert "changes buffer 'count'" in message
    _, message = _error(lambda: to_relax(_function(lambda x: x.add_(1), X.clone())))
    assert "changes its input" in message


def test_dynamic_shapes():
    program = torch.export.export(nn.ReLU().eval(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    error, message = _error(lambda: to_relax(export_model(program)))
    assert isinstance(error, ExportError)
    assert message.startswith("input 'input' has a dynamic shape (s")


def test_shapes_that_depend_on_data():
    _, message = _error(lambda: to_relax(_function(torch.nonzero, X)))
    assert "artifacts have fixed shapes" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes_without_kernels(dtype):
    _, message = _error(lambda: to_relax(_function(lambda x: x + 1, X.to(dtype))))
    assert message.startswith(f"input 'args_0' is {str(dtype)[6:]}: bnncc compiles float32")
    _, message = _error(lambda: to_relax(_function(lambda x: x.to(dtype).abs().float(), X)))
    assert message.startswith(f"a value in the model's own forward is {str(dtype)[6:]}")


def test_control_flow_on_data():
    error, message = _error(lambda: _function(lambda x: x if x.sum() > 0 else -x, X))
    assert isinstance(error, ExportError)
    assert message.startswith("torch.export cannot trace the model: ")


def test_wrong_example_inputs():
    assert "no example inputs" in _error(lambda: export_model(nn.ReLU().eval()))[1]
    assert "cannot trace" in _error(lambda: export_model(nn.ReLU().eval(), (X, X)))[1]
    assert "cannot trace" in _error(lambda: export_model(nn.Conv2d(3, 4, 1).eval(), (X,)))[1]
    assert "cannot compile a str" in _error(lambda: export_model("model.pt2"))[1]


def test_outputs_and_inputs_that_are_not_tensors():
    _, message = _error(lambda: to_relax(_function(lambda x: (x, 3), X)))
    assert message == "output 'output_1' is 3, not a tensor: return tensors only"
    _, message = _error(lambda: to_relax(_function(lambda x: (x, None), X)))
    assert message == "output 'output_1' is None, not a tensor: return tensors only"
    _, message = _error(lambda: to_relax(_function(lambda x, k: x * k, X, 2)))
    assert "input 'args_1' is 2, not a tensor" in message
