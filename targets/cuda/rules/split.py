"""A kernel in two: the anchor alone, and what follows it.

    kernel(x, w, …, y)   -->   anchor(x, w, sums);  rest(…, sums, y)

For epilogues that no tile of the anchor can compute: packing whose words span tiles, padding around what is packed.
The sums between them are scratch of the step (`bnncc.targets.cuda.emit.place`).
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Var
from tvm.s_tir.stmt import SBlock, SBlockRealize


def split(func: tirx.PrimFunc, sums: Any) -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    """Both functions. sums: the buffer that is filled by the anchor, by the last of its stages if it has two."""
    nests = list(func.body.block.body.seq)
    end = 1 + max(i for i, nest in enumerate(nests) if _fills(nest, sums))
    return _function(func, nests[:end], sums), _function(func, nests[end:], sums)


def _fills(stmt: Any, buffer: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(stmt, [(tirx.BufferStore, lambda store: found.append(store.buffer))])
    return any(stored.same_as(buffer) for stored in found)


def _uses(stmt: Any, buffer: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(stmt, [(Var, lambda var: found.append(var) if var.same_as(buffer) else None)])
    return bool(found)


def _function(func: tirx.PrimFunc, nests: list[Any], sums: Any) -> tirx.PrimFunc:
    body = tirx.SeqStmt(nests) if len(nests) > 1 else nests[0]
    params = [param for param in func.params if _uses(body, param)]
    local = [b for b in func.body.block.alloc_buffers if _uses(body, b) and not b.same_as(sums)]
    root = SBlock([], [], [], "root", body, alloc_buffers=local)
    return tirx.PrimFunc([*params, sums], SBlockRealize([], True, root)).with_attrs(dict(func.attrs.items()))
