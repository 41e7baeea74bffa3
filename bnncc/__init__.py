"""bnncc: a compiler for binary and low-bit neural networks."""

from pathlib import Path

# A checkout keeps `passes/`, `runtime/` and `targets/` beside this folder; after a normal install Python may still
# find this folder first (`python -m …` from the checkout), and then looks for the sub-packages there.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

__version__ = "0.1.0"

_LAZY = {
    "Artifact": "bnncc.artifact",
    "Options": "bnncc.compiler",
    "ParityReport": "bnncc.runtime.report",
    "compile": "bnncc.compiler",
    "validate": "bnncc.eager",
}


def __getattr__(name: str) -> object:
    """Loads the compiler when it is first used, so that a machine that only runs artifacts needs NumPy alone."""
    if name not in _LAZY:
        raise AttributeError(f"module 'bnncc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
