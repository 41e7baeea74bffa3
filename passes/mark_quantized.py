"""Quantized values carry how far two neighbours are apart, for the parity check.

    y = round(clip(x, 0, 1) · 3) / 3   -->   the same, and in the table of origins: y has step 1/3

Where a quantizer follows a float sum in another order than eager's, a value near a tie may round to the other side: one
step, which no tolerance for rounding errors covers. After constants are folded (scales are numbers by then) and before
anything takes a quantizer apart. Changes no code. Declines signs, which have bits of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bnncc.passes.grids import Grids
from bnncc.passes.rewriter import Rewriter, module_pass


class _Mark(Rewriter):
    def begin(self) -> None:
        grids = Grids(self.definition)
        for binding in self.bindings:
            origin = self.origin(binding.var)
            if origin and origin.node and (step := grids.step(binding.var)):
                self.origins[binding.var.name] = replace(origin, step=step)

    def rewrite(self, var: Any, value: Any) -> Any | None:
        return None


MarkQuantized = module_pass(lambda mod: _Mark(mod).run(), "MarkQuantized")
