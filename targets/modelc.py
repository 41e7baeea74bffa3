"""Writes the C of one model: model.c, the tables that the driver reads, and model.h, the interface for C programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bnncc.dialect.plan import Plan, Step, Tensor
from bnncc.runtime.errors import LinkError
from bnncc.runtime.manifest import Manifest, PortEntry, VersionEntry, tensor_bytes

API = (
    "create", "create_version", "destroy", "version", "run", "set_threads", "error", "manifest", "input_count",
    "output_count", "input", "output", "tensor_data", "run_steps",
)  # fmt: skip
"""What an artifact exports, each name after the model's own."""

MANIFEST_SECTION = ".bnncc.manifest"

_TYPE_CODES = {"i": "DL_INT", "u": "DL_UINT", "f": "DL_FLOAT", "b": "DL_BOOL"}
# With these names, <name>_create and the like would be functions of the C library that the driver itself calls.
_TAKEN = ("bnncc", "pthread", "timer")


def symbol_prefix(name: str) -> str:
    """The model's name as a C identifier. Raises LinkError for a name that the C interface cannot carry."""
    prefix = re.sub(r"[^A-Za-z0-9_]", "_", name)
    if not prefix or prefix in _TAKEN:
        raise LinkError(f"model name '{name}' cannot be used: its C functions would clash; pass another name")
    return f"_{prefix}" if prefix[0].isdigit() else prefix


def version_script(prefix: str) -> str:
    """What the library exports: the API, nothing else."""
    return "{ global: " + " ".join(f"{prefix}_{function};" for function in API) + " local: *; };\n"


def model_h(manifest: Manifest) -> str:
    """The header for C and C++ programs."""
    p, alignment = manifest["prefix"], manifest["io_alignment"]
    guard, target = f"{p.upper()}_H", manifest["target"]
    ports = [f" *   input {i}:  {_port_text(port)}" for i, port in enumerate(manifest["inputs"])]
    versions = ", ".join(version["name"] for version in manifest["versions"])
    ports += [f" *   output {i}: {_port_text(port)}" for i, port in enumerate(manifest["outputs"])]
    return f"""\
/* C interface of the model "{_comment(manifest["name"])}", compiled for {target} by bnncc {manifest["bnncc"]}.
 *
{chr(10).join(ports)}
 *
 * Instances are independent of each other; one instance serves one thread at a time.
 */
#ifndef {guard}
#define {guard}

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

typedef struct {p}_instance {p}_instance;

typedef struct {{
  const char *name;
  const char *dtype; /* "float32", "int64", ... */
  int32_t ndim;
  const int64_t *shape;
  size_t bytes;
}} {p}_tensor;

/* A new instance, which owns all memory it needs; NULL on failure, see {p}_error. Of the library's versions
 *   {versions}
 * it runs the first that this machine can, or the one that the environment variable BNNCC_VERSION names. */
{p}_instance *{p}_create(void);
/* The same with a version chosen by name, for tests. */
{p}_instance *{p}_create_version(const char *version);
void {p}_destroy({p}_instance *instance);

/* The name of the version that the instance runs. */
const char *{p}_version(const {p}_instance *instance);

/* Runs the model. inputs and outputs: one pointer each in the order above, to contiguous arrays that do not overlap.
 * Arrays aligned to {alignment} bytes are used in place, others are copied. Returns 0, or -1 (see {p}_error). */
int {p}_run({p}_instance *instance, const void *const *inputs, void *const *outputs);

/* How many threads compute; 0, the default, takes one per physical core that the process may use. Returns 0 or -1. */
int {p}_set_threads({p}_instance *instance, int32_t threads);

/* The calling thread's last error, one line. */
const char *{p}_error(void);

/* The manifest, JSON. */
const char *{p}_manifest(void);

int32_t {p}_input_count(void);
int32_t {p}_output_count(void);
/* NULL for an index out of range. */
const {p}_tensor *{p}_input(int32_t index);
const {p}_tensor *{p}_output(int32_t index);

/* For inspection: the memory of a tensor of the manifest (NULL: no such tensor), and running single steps. They see
 * inputs and outputs in the instance's own memory, not in the arrays given to {p}_run. */
void *{p}_tensor_data({p}_instance *instance, int32_t tensor);
int {p}_run_steps({p}_instance *instance, int32_t first, int32_t count);

#ifdef __cplusplus
}}
#endif

#endif
"""


def model_c(plans: Sequence[Plan], manifest: Manifest, weights: Path, manifest_file: Path) -> str:
    """The tables as constants, and the public functions.

    plans: of the manifest's versions, in order. weights, manifest_file: files that the assembler includes. Their names
    must change with their content, since the C compiler's cache does not look into them.
    """
    prefix = manifest["prefix"]
    kernels = sorted({step.kernel for plan in plans for step in (*plan.init, *plan.steps)})
    versions = list(zip(plans, manifest["versions"], strict=True))
    lines = [
        '#include "driver.h"',
        '#include "model.h"',
        "",
        _included(".rodata.bnncc_weights", "bnncc_weights", weights.name, terminate=False),
        _included(MANIFEST_SECTION, "bnncc_manifest", manifest_file.name, terminate=True),
        'extern const unsigned char bnncc_weights[] __attribute__((visibility("hidden")));',
        'extern const char bnncc_manifest[] __attribute__((visibility("hidden")));',
        *(f"int __tvm_ffi_{kernel}(void *, const FFIAny *, int32_t, FFIAny *);" for kernel in kernels),
        "",
        *(line for i, (plan, _) in enumerate(versions) for line in _version_tables(plan, i)),
        *_table("ModelVersion", "versions", [_version_row(*version, i) for i, version in enumerate(versions)]),
        *_port_tables("input", manifest["inputs"]),
        *_port_tables("output", manifest["outputs"]),
        "const Model bnncc_model = {",
        f"    .name = {_string(manifest['name'])},",
        "    .manifest = bnncc_manifest, .weights = bnncc_weights,",
        "    .input_descriptions = input_descriptions, .output_descriptions = output_descriptions,",
        f"    .input_count = {len(manifest['inputs'])}, .output_count = {len(manifest['outputs'])},",
        f"    .io_alignment = {manifest['io_alignment']},",
        f"    .versions = versions, .version_count = {len(versions)},",
        "};",
        "",
        _FUNCTIONS.replace("@", prefix),
    ]
    return "\n".join(lines)


_FUNCTIONS = """\
_Static_assert(sizeof(@_tensor) == sizeof(Description), "model.h and driver.h describe tensors alike");

#define API __attribute__((visibility("default")))
API @_instance *@_create(void) { return @_create_version(NULL); }
API @_instance *@_create_version(const char *version) { return (@_instance *)bnncc_create(&bnncc_model, version); }
API void @_destroy(@_instance *self) { bnncc_destroy((Instance *)self); }
API const char *@_version(const @_instance *self) { return bnncc_version((const Instance *)self)->name; }
API int @_run(@_instance *self, const void *const *from, void *const *to) {
  return bnncc_run((Instance *)self, from, to);
}
API int @_set_threads(@_instance *self, int32_t threads) { return bnncc_set_threads((Instance *)self, threads); }
API const char *@_error(void) { return bnncc_error(); }
API const char *@_manifest(void) { return bnncc_model.manifest; }
API int32_t @_input_count(void) { return bnncc_model.input_count; }
API int32_t @_output_count(void) { return bnncc_model.output_count; }
API const @_tensor *@_input(int32_t i) {
  return i < 0 || i >= bnncc_model.input_count ? NULL : (const @_tensor *)&input_descriptions[i];
}
API const @_tensor *@_output(int32_t i) {
  return i < 0 || i >= bnncc_model.output_count ? NULL : (const @_tensor *)&output_descriptions[i];
}
API void *@_tensor_data(@_instance *self, int32_t tensor) { return bnncc_tensor_data((Instance *)self, tensor); }
API int @_run_steps(@_instance *self, int32_t first, int32_t count) {
  return bnncc_run_steps((Instance *)self, first, count);
}
"""


def _comment(text: str) -> str:
    """Text that can stand in a C comment without ending it or reaching into the next line."""
    return re.sub(r"[^\w .,:+()\[\]-]", "_", text)


def _port_text(port: PortEntry) -> str:
    return f"{_comment(port['name'])} {port['dtype']} [{', '.join(map(str, port['shape']))}]"


def _included(section: str, label: str, file: str, terminate: bool) -> str:
    """A file as bytes of a section. The 64-byte alignment is what kernels rely on for their operands."""
    lines = [
        f'.section {section},"a",%progbits', ".balign 64", f".globl {label}", f".hidden {label}", f"{label}:",
        f'.incbin "{file}"', *([".byte 0"] if terminate else []), ".previous",
    ]  # fmt: skip
    return "__asm__(" + "\n        ".join(_string(line + "\n") for line in lines) + ");"


def _table(kind: str, name: str, rows: Sequence[str]) -> list[str]:
    # C has no empty arrays; a model without any row (no init steps, say) gets one that nothing counts.
    return [f"static const {kind} {name}[] = {{", *(f"    {{{row}}}," for row in rows or ["0"]), "};", ""]


def _version_tables(plan: Plan, i: int) -> list[str]:
    """The tables of version `i`; its number ends their names."""
    shapes = [size for tensor in plan.tensors for size in tensor.shape]
    calls = [*plan.init, *plan.steps]
    return [
        f"static const int64_t shapes_{i}[] = {{{_list(shapes)}}};",
        f"static const int32_t arguments_{i}[] = {{{_list([arg for step in calls for arg in step.args])}}};",
        f"static const int32_t inputs_{i}[] = {{{_list(plan.inputs)}}}, outputs_{i}[] = {{{_list(plan.outputs)}}};",
        "",
        *_table("ModelTensor", f"tensors_{i}", _tensor_rows(plan.tensors, i)),
        *_table("ModelStep", f"steps_{i}", _step_rows(calls)),
    ]


def _version_row(plan: Plan, version: VersionEntry, i: int) -> str:
    return ", ".join(
        [
            f".name = {_string(version['name'])}",
            f".required_features = {_string(' '.join(version['features']))}",
            f".tensors = tensors_{i}, .init = steps_{i}, .steps = steps_{i} + {len(plan.init)}",
            f".arguments = arguments_{i}, .inputs = inputs_{i}, .outputs = outputs_{i}",
            f".tensor_count = {len(plan.tensors)}",
            f".init_count = {len(plan.init)}, .step_count = {len(plan.steps)}",
            f".argument_count = {sum(len(step.args) for step in (*plan.init, *plan.steps))}",
            f".arena_bytes = {plan.arena_bytes}, .persistent_bytes = {plan.persistent_bytes}",
        ]
    )


def _tensor_rows(tensors: Sequence[Tensor], version: int) -> list[str]:
    rows, at = [], 0
    for tensor in tensors:
        dtype = np.dtype(tensor.dtype)
        kind = f"{{{_TYPE_CODES[dtype.kind]}, {dtype.itemsize * 8}, 1}}"
        rows.append(
            f"{_string(tensor.name)}, {_string(tensor.dtype)}, shapes_{version} + {at}, {len(tensor.shape)}, {kind}, "
            f"SPACE_{tensor.space.upper()}, {tensor.offset}, {tensor_bytes(tensor.shape, tensor.dtype)}"
        )
        at += len(tensor.shape)
    return rows


def _step_rows(steps: Sequence[Step]) -> list[str]:
    rows, at = [], 0
    for step in steps:
        rows.append(f"{_string(step.kernel)}, __tvm_ffi_{step.kernel}, {at}, {len(step.args)}")
        at += len(step.args)
    return rows


def _port_tables(role: str, ports: Sequence[PortEntry]) -> list[str]:
    """`input_shapes` and `input_descriptions`, or the same of outputs."""
    shapes = [size for port in ports for size in port["shape"]]
    rows, at = [], 0
    for port in ports:
        rows.append(
            f"{_string(port['name'])}, {_string(port['dtype'])}, {len(port['shape'])}, {role}_shapes + {at}, "
            f"{tensor_bytes(port['shape'], port['dtype'])}"
        )
        at += len(port["shape"])
    return [
        f"static const int64_t {role}_shapes[] = {{{_list(shapes)}}};",
        *_table("Description", f"{role}_descriptions", rows),
    ]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "0"


def _string(text: str) -> str:
    """A C string literal; anything but plain ASCII as octal escapes, which cannot run into the next character."""
    plain = "".join(
        chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in text.encode("utf-8", "replace")
    )
    return f'"{plain}"'
