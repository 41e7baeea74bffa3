"""How bnncc looks in a terminal: progress, tables, sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bnncc.runtime.manifest import DeviceEntry, LayerEntry, Manifest, PortEntry
from bnncc.targets.cuda.descriptor import ARCHITECTURES, WARP
from bnncc.targets.cuda.occupancy import blocks_per_sm

if TYPE_CHECKING:
    from bnncc.inspection import Finding

#: Width of tables that go into a pipe or a file: enough that none breaks.
PIPE_WIDTH = 160


def console() -> Console:
    """Standard output."""
    out = Console()
    return out if out.is_terminal else Console(width=PIPE_WIDTH)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, if that is a terminal; yields the callback ``progress(stage, done, total)`` that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


def artifact_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """What `bnncc inspect` says of an artifact above its tables: pairs of a heading and its line."""
    facts = [
        ("model", f"{manifest['name']} (bnncc {manifest['bnncc']})"),
        ("target", f"{manifest['target']} ({manifest['arch']})"),
        ("inputs", ", ".join(map(_port, manifest["inputs"]))),
        ("outputs", ", ".join(map(_port, manifest["outputs"]))),
        ("weights", readable(manifest["weights_bytes"])),
    ]
    if quantized := dict.fromkeys(entry["path"] or entry["layer"] for entry in manifest.get("quantized", ())):
        facts.append(("opt-in", f"{manifest['float_layers']} in {', '.join(quantized)}"))
    for version in manifest["versions"]:
        device = version["device"]
        needs = f"a driver of CUDA {_release(device['driver'])}" if device else " ".join(version["features"])
        facts.append(("version", f"{version['name']}: {version['cpu']}; needs {needs}"))
        if device:
            sizes = f"{readable(device['image_bytes'])} for {device['sm']}, {readable(device['ptx_bytes'])} PTX"
            facts.append(("code", f"{sizes} for later GPUs"))
        facts.append(
            (
                "memory",
                f"{readable(version['arena_bytes'])} arena, {readable(version['persistent_bytes'])} kept, "
                f"{readable(version['weights_bytes'])} weights{', on the GPU' if device else ''}",
            )
        )
    return facts


def layer_table(layers: Sequence[LayerEntry]) -> Table:
    """The per-layer table of a manifest: one row a layer, and a row of sums."""
    table = Table(show_footer=True)
    table.add_column("layer", "total", overflow="fold")
    table.add_column("operator")
    table.add_column("bits (act × weight)", justify="right")
    table.add_column("MACs", f"{sum(layer['macs'] for layer in layers):,}", justify="right")
    table.add_column("weights", readable(sum(layer["weight_bytes"] for layer in layers)), justify="right")
    table.add_column("output", justify="right")
    for layer in layers:
        table.add_row(
            layer["path"],
            layer["op"],
            f"{layer['activation_bits']} × {layer['weight_bits']}",
            f"{layer['macs']:,}" if layer["macs"] else "",
            readable(layer["weight_bytes"]) if layer["weight_bytes"] else "",
            "×".join(map(str, layer["output_shape"])),
        )
    return table


def kernel_table(device: DeviceEntry) -> Table:
    """The launches of a version for a GPU: one row for all that are alike, in the order of the first ones. Occupancy is
    the share of a multiprocessor's warps that its blocks of that kernel have at most."""
    table = Table(show_footer=True)
    alike = Counter(
        (launch["function"], tuple(launch["grid"]), tuple(launch["block"]), launch["shared_bytes"])
        for step in device["launches"]
        for launch in step
    )
    table.add_column("kernel", "total", overflow="fold")
    table.add_column("launches", str(alike.total()), justify="right")
    for heading in ("grid", "block", "registers", "shared memory", "local memory", "blocks per SM", "occupancy"):
        table.add_column(heading, justify="right")
    gpu = ARCHITECTURES.get(device["sm"].rstrip("af"))
    for (function, grid, block, dynamic), count in alike.items():
        kernel = device["kernels"][function]
        threads, shared = math.prod(block), kernel["shared_bytes"] + dynamic
        blocks = blocks_per_sm(gpu, threads, kernel["registers"], shared) if gpu else None
        warps = -(-threads // WARP)
        table.add_row(
            function,
            str(count),
            _extents(grid),
            _extents(block),
            str(kernel["registers"]),
            f"{readable(kernel['shared_bytes'])} + {readable(dynamic)}" if dynamic else readable(shared),
            readable(kernel["local_bytes"]) if kernel["local_bytes"] else "",
            "" if blocks is None else str(blocks),
            "" if blocks is None or gpu is None else f"{blocks * warps * WARP / gpu.threads_per_sm:.0%}",
            style="yellow" if kernel["local_bytes"] else None,
        )
    return table


def _extents(extents: tuple[int, ...]) -> str:
    """A grid or a block, without the trailing dimensions of 1."""
    used = max((axis for axis, extent in enumerate(extents) if extent > 1), default=0)
    return "×".join(map(str, extents[: used + 1]))


def finding_table(findings: Sequence[Finding]) -> Table:
    """What every layer of a model becomes: one row each, and a row of sums."""
    table = Table(show_footer=True)
    macs = sum(finding.layer.macs for finding in findings if finding.layer)
    weights = sum(finding.layer.weight_bytes for finding in findings if finding.layer)
    table.add_column("layer", "total", overflow="fold")
    table.add_column("operator", overflow="fold")
    table.add_column("becomes")
    table.add_column("bits (act × weight)", justify="right")
    table.add_column("MACs", f"{macs:,}", justify="right")
    table.add_column("weights", readable(weights), justify="right")
    for finding in findings:
        layer = finding.layer
        table.add_row(
            finding.path or "(forward)",
            finding.operator,
            f"{finding.becomes}: {finding.reason}" if finding.reason else finding.becomes,
            f"{layer.activation_bits} × {layer.weight_bits}" if layer else "",
            f"{layer.macs:,}" if layer and layer.macs else "",
            readable(layer.weight_bytes) if layer and layer.weight_bytes else "",
            style="red" if finding.becomes == "refused" else None,
        )
    return table


def readable(size: int) -> str:
    """A number of bytes for people: 640 B, 1.5 KiB, 20.0 MiB."""
    if size < 1024:
        return f"{size} B"
    amount = size / 1024
    for unit in ("KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def _release(version: int) -> str:
    """A release of CUDA, as cuDriverGetVersion counts: "12.0" of 12000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _port(port: PortEntry) -> str:
    return f"{port['name']} {port['dtype']} [{', '.join(map(str, port['shape']))}]"
