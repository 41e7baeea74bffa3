"""What MODEL may be on the command line, and how it becomes a PyTorch or ONNX model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from bnncc.runtime.errors import BnnccError

_KINDS = "MODEL is a .pt2 file, an .onnx file or package.module:callable"


def is_onnx(model: Any) -> bool:
    """Whether it is an `onnx.ModelProto` or the path of an `.onnx` file; does not import onnx."""
    if isinstance(model, str | Path):
        return str(model).endswith(".onnx")
    onnx = sys.modules.get("onnx")
    return onnx is not None and isinstance(model, onnx.ModelProto)


def load_model(model: str, weights: Path | None = None) -> Any:
    """The model that `model` names, ready for inference: a module, an exported program or an ONNX model.

    model: path of a `.pt2` file (`torch.export.save`) or of an `.onnx` file, or `package.module:callable`, where the
        callable returns a module (a class without required arguments serves) or is one; the working directory is
        searched too.
    weights: a state dict (`torch.save(model.state_dict(), …)`) for a module; read without running code from the file.
    Raises BnnccError for whatever cannot be found, read or called.
    """
    if model.endswith(".pt2"):
        if weights is not None:
            raise BnnccError("--weights goes with package.module:callable; a .pt2 file holds its weights")
        return _load_exported(Path(model))
    if is_onnx(model):
        if weights is not None:
            raise BnnccError("--weights goes with package.module:callable; an .onnx file holds its weights")
        from bnncc.frontends.onnx_graph import read

        return read(model)
    if ":" not in model:
        raise BnnccError(f"'{model}' is no model: {_KINDS}")
    module = _call(model)
    if weights is not None:
        _load_weights(module, weights)
    return module.eval()


def _load_exported(path: Path) -> torch.export.ExportedProgram:
    if not path.is_file():
        raise BnnccError(f"there is no file '{path}'")
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises whatever its unpickling meets
        raise BnnccError(f"'{path}' is no exported program: {_line(error)}; write it with torch.export.save") from error


def _call(name: str) -> torch.nn.Module:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise BnnccError(f"cannot import '{module_name}': {_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise BnnccError(f"'{module_name}' has no '{attribute}'; {_KINDS}")
        found = getattr(found, part)
    if not isinstance(found, torch.nn.Module):
        if not callable(found):
            raise BnnccError(f"'{name}' is a {type(found).__name__}, neither a module nor callable")
        try:
            found = found()
        except TypeError as error:
            raise BnnccError(f"'{name}' must be callable without arguments: {_line(error)}") from error
    if not isinstance(found, torch.nn.Module):
        raise BnnccError(f"'{name}' returned a {type(found).__name__}, not a torch.nn.Module")
    return found


def _load_weights(module: torch.nn.Module, path: Path) -> None:
    if not path.is_file():
        raise BnnccError(f"there is no file '{path}'")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except Exception as error:  # unpickling raises many kinds, load_state_dict a RuntimeError
        raise BnnccError(f"'{path}' does not hold this model's state dict: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first two lines of a message as one; torch says what is wrong in the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
