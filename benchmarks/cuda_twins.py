"""Float twins of networks as Python source that needs torch alone: no weights, and none of bitorch.

The machine with a GPU times the twin's shapes; which numbers its weights are decides nothing. Whatever release of torch
is there has to take it, so only arguments are written that all of them know.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.node import _get_qualified_name

_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    nn.BatchNorm2d: ("num_features", "eps"),
    nn.Linear: ("in_features", "out_features"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.ReLU: (),
}

_HEAD = '''"""{name}, its binary layers as plain convolutions: what torch runs beside the artifact."""

import _operator

import torch
from torch import nn


class Twin(nn.Module):
    def __init__(self):
        super().__init__()
'''


def source_of(twin: fx.GraphModule, name: str) -> str:
    """A module of Python with a class `Twin` that computes what the traced network does. Raises ValueError for layers
    that `_ARGUMENTS` lacks."""
    modules = dict(twin.named_modules())
    used = list(dict.fromkeys(str(node.target) for node in twin.graph.nodes if node.op == "call_module"))
    places = {path: f"self.layers[{i}]" for i, path in enumerate(used)}
    lines = [_HEAD.format(name=name), "        self.layers = nn.ModuleList([\n"]
    lines += [f"            {_layer(modules[path])},\n" for path in used]
    lines += ["        ])\n\n", "    def forward(self, x):\n"]
    last = {used: node for node in twin.graph.nodes for used in node.all_input_nodes}
    for node in twin.graph.nodes:
        lines.append(f"        {_line(node, places)}\n")
        if node.op != "output" and (gone := [n.name for n in node.all_input_nodes if last[n] is node]):
            lines.append(f"        del {', '.join(gone)}\n")  # its memory is used again, as in any network
    return "".join(lines)


def _layer(module: nn.Module) -> str:
    if type(module) not in _ARGUMENTS:
        raise ValueError(f"a twin has a {type(module).__name__}, which nobody has said how to write")
    given = {name: getattr(module, name) for name in _ARGUMENTS[type(module)]}
    if isinstance(module, nn.Conv2d | nn.Linear):
        given["bias"] = module.bias is not None
    return f"nn.{type(module).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def _line(node: fx.Node, places: dict[str, str]) -> str:
    if node.op == "placeholder":
        return f"{node.name} = x"
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    arguments = ", ".join([*map(_text, node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items())])
    if node.op == "call_module":
        return f"{node.name} = {places[str(node.target)]}({arguments})"
    if node.op == "call_method":
        own, *others = map(_text, node.args)
        return f"{node.name} = {own}.{node.target}({', '.join(others)})"
    if node.op == "call_function" and callable(node.target):
        return f"{node.name} = {_get_qualified_name(node.target)}({arguments})"
    raise ValueError(f"a twin has a node of kind {node.op}, which nobody has said how to write")


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        inside = "".join(f"{_text(item)}, " for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return value.name if isinstance(value, fx.Node) else repr(value)
