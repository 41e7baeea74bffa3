"""The import directions: what each folder may import, read from the source without running it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# folder → the packages of ours it may import, and third-party packages when the module is loaded. What is missing here
# is forbidden; `bnncc/` itself (public API, command line, front ends, layers) may import everything.
ALLOWED = {
    "runtime": ({"bnncc.runtime"}, {"numpy"}),
    "bnncc/dialect": ({"bnncc.dialect", "bnncc.runtime"}, {"numpy", "torch", "tvm", "tvm_ffi"}),
    "passes": ({"bnncc.passes", "bnncc.dialect", "bnncc.runtime"}, {"numpy", "torch", "tvm", "tvm_ffi"}),
    "targets": ({"bnncc.targets", "bnncc.dialect", "bnncc.runtime"}, {"numpy", "tvm", "tvm_ffi"}),
}
# Inside functions only: what shows a report, on machines that have it.
LATE = {"runtime": {"rich", "jinja2"}}


def imported(source, package=""):
    """(module, whether inside a function) of every import in a module of `package`, except under TYPE_CHECKING."""

    def visit(node, late):
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = package.split(".")
                module = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [module])])
            if module in ("bnncc", package):
                yield from ((f"{module}.{alias.name}", late) for alias in node.names)
            else:
                yield module, late
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        else:
            inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def package_of(file):
    """The name under which the folder of a source file is installed."""
    parts = file.relative_to(ROOT).parent.parts
    return ".".join(parts if parts[:1] == ("bnncc",) else ("bnncc", *parts))


def forbidden(folder, source, package=""):
    ours, others = ALLOWED[folder]
    for module, late in imported(source, package):
        top = module.split(".")[0]
        if top == "bnncc":
            if module != "bnncc.__version__" and not any(f"{module}.".startswith(f"{name}.") for name in ours):
                yield module
        elif top not in sys.stdlib_module_names | others | (LATE.get(folder, set()) if late else set()):
            yield module


@pytest.mark.parametrize("folder", ALLOWED)
def test_directions(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): list(forbidden(folder, file.read_text(), package_of(file))) for file in files}
    assert {file: modules for file, modules in found.items() if modules} == {}


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("runtime", "import torch"),
        ("runtime", "from bnncc import passes"),
        ("runtime", "def f():\n    import bnncc.targets"),
        ("runtime", "import rich"),
        ("passes", "from bnncc.targets.link import link"),
        ("targets", "import bnncc.passes"),
        ("bnncc/dialect", "from bnncc.frontends import torch"),
        ("bnncc/dialect", "from ..layers import conv"),
    ],
)
def test_the_check_sees(folder, source):
    assert list(forbidden(folder, source, package_of(ROOT / folder / "module.py")))


def test_nobody_imports_the_folders_by_their_own_names():
    bare = {"passes", "runtime", "targets"}
    for file in ROOT.rglob("*.py"):
        if file.relative_to(ROOT).parts[0] in ("build", ".venv"):
            continue
        modules = {module.split(".")[0] for module, _ in imported(file.read_text(), package_of(file))}
        assert not modules & bare, file
