"""Every output of the model becomes a buffer of its own.

    return (x, y, reshape(y))   -->   c = bnncc.copy(x); d = bnncc.copy(reshape(y)); return (c, y, d)

Before `FormKernels`. The caller provides the memory of the outputs, so that none can share memory with an input, a
constant or another output. Declines nothing; an output with memory of its own stays as it is.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bnncc.dialect.ops import call, op_name
from bnncc.passes.form_kernels import ALIASES
from bnncc.passes.rewriter import Rewriter, module_pass


class _Own(Rewriter):
    def rewrite(self, var: Any, value: Any) -> Any | None:
        return None

    def finish(self, output: Any) -> Any:
        seen: set[Any] = set(self.func.params)
        fields = list(output.fields) if isinstance(output, relax.Tuple) else [output]
        owned = [self.owned(field, index, seen) for index, field in enumerate(fields)]
        return relax.Tuple(owned) if isinstance(output, relax.Tuple) else owned[0]

    def owned(self, field: Any, index: int, seen: set[Any]) -> Any:
        memory = field
        while isinstance(memory, relax.Var) and op_name(value := self.builder.lookup_binding(memory)) in ALIASES:
            memory = value.args[0]
        if isinstance(memory, relax.Var) and memory not in seen:
            seen.add(memory)
            return field
        held = self.origin(field) if isinstance(field, relax.Var) else None
        return self.emit(call("copy", [field]), f"output{index}__copy", held)


OwnOutputs = module_pass(lambda mod: _Own(mod).run(), "OwnOutputs")
