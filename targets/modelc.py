"""Writes the C of one model: model.c, the tables that the driver reads, and model.h, the interface for C programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnncc.dialect.plan import Plan, Step, Tensor
from bnncc.runtime.errors import LinkError
from bnncc.runtime.manifest import Manifest, PortEntry, VersionEntry, tensor_bytes
from bnncc.targets.launch import DeviceCode

API = (
    "create", "create_version", "create_on", "destroy", "version", "device", "run", "run_device", "stream", "wait",
    "synchronize", "set_threads", "host_alloc", "host_free", "device_alloc", "device_free", "copy", "error", "manifest",
    "input_count", "output_count", "input", "output", "tensor_data", "run_steps",
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
/* The same on the GPU of this index, as CUDA counts them; version may be NULL. A negative index, which is all that a
 * version for the CPU takes: the one that the environment variable BNNCC_DEVICE names ("1", "cuda:1"), else 0. */
{p}_instance *{p}_create_on(const char *version, int32_t device);
void {p}_destroy({p}_instance *instance);

/* The name of the version that the instance runs, and the index of its GPU, -1 on the CPU. */
const char *{p}_version(const {p}_instance *instance);
int32_t {p}_device(const {p}_instance *instance);

/* Runs the model. inputs and outputs: one pointer each in the order above, to contiguous arrays that do not overlap.
 * On the CPU, arrays aligned to {alignment} bytes are used in place, others are copied. A GPU copies from and to pinned
 * memory ({p}_host_alloc, or anybody's) by itself, all else through pinned memory of the instance.
 * Returns 0, or -1 (see {p}_error), as all functions here that return int. */
int {p}_run({p}_instance *instance, const void *const *inputs, void *const *outputs);

/* The same with arrays in the GPU's memory, which are used in place if they are aligned to {alignment} bytes, without
 * waiting for the GPU: the work takes its turn in `stream`, a CUstream or cudaStream_t, where NULL is CUDA's default
 * stream. On the CPU it is {p}_run, and the stream must be NULL. */
int {p}_run_device({p}_instance *instance, const void *const *inputs, void *const *outputs, void *stream);
/* What the instance was asked to do: the host waits for it, or work given to a stream from now on does. */
int {p}_synchronize({p}_instance *instance);
int {p}_wait({p}_instance *instance, void *stream);
/* The instance's own stream; NULL on the CPU. */
void *{p}_stream(const {p}_instance *instance);

/* Memory that is used in place: of the host (pinned, for a GPU), and of the device that the instance runs on, which may
 * be the host. NULL on failure. It must be given back before the instance is destroyed. Other threads may call these
 * four while the instance runs. */
void *{p}_host_alloc({p}_instance *instance, size_t bytes);
void {p}_host_free({p}_instance *instance, void *memory);
void *{p}_device_alloc({p}_instance *instance, size_t bytes);
void {p}_device_free({p}_instance *instance, void *memory);
/* Copies from anywhere to anywhere, behind what the instance was asked to do, and waits for it. */
int {p}_copy({p}_instance *instance, void *to, const void *from, size_t bytes);

/* How many threads compute; 0, the default, takes one per physical core that the process may use. On a GPU it changes
 * nothing. */
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

/* For inspection: the memory of a tensor of the manifest, on the device (NULL: no such tensor), and running single
 * steps. They see inputs and outputs in the instance's own memory, not in the arrays given to {p}_run. */
void *{p}_tensor_data({p}_instance *instance, int32_t tensor);
int {p}_run_steps({p}_instance *instance, int32_t first, int32_t count);

#ifdef __cplusplus
}}
#endif

#endif
"""


@dataclass(frozen=True)
class Files:
    """What the assembler includes. Names must change with the content: the C compiler's cache does not look into it.

    codes: cubin and PTX of each version; None for one that runs on the CPU.
    """

    weights: Path
    manifest: Path
    codes: Sequence[tuple[Path, Path] | None]


def model_c(plans: Sequence[Plan], devices: Sequence[DeviceCode | None], manifest: Manifest, files: Files) -> str:
    """The tables as constants, and the public functions. plans, devices: of the manifest's versions, in order."""
    prefix = manifest["prefix"]
    on_host = [plan for plan, device in zip(plans, devices, strict=True) if device is None]
    kernels = sorted({step.kernel for plan in on_host for step in (*plan.init, *plan.steps)})
    versions = list(zip(plans, devices, manifest["versions"], strict=True))
    lines = [
        '#include "driver.h"',
        '#include "model.h"',
        "",
        _included(".rodata.bnncc_weights", "bnncc_weights", files.weights.name, terminate=False),
        _included(MANIFEST_SECTION, "bnncc_manifest", files.manifest.name, terminate=True),
        'extern const unsigned char bnncc_weights[] __attribute__((visibility("hidden")));',
        'extern const char bnncc_manifest[] __attribute__((visibility("hidden")));',
        *(f"int __tvm_ffi_{kernel}(void *, const FFIAny *, int32_t, FFIAny *);" for kernel in kernels),
        "",
        *(line for i, (plan, device, _) in enumerate(versions) for line in _version_tables(plan, device is None, i)),
        *(line for i, version in enumerate(versions) for line in _device_tables(*version, files.codes[i], i)),
        *_table("ModelVersion", "versions", [_version_row(*version, i) for i, version in enumerate(versions)]),
        *_port_tables("input", manifest["inputs"]),
        *_port_tables("output", manifest["outputs"]),
        "const Model bnncc_model = {",
        f"    .name = {_string(manifest['name'])},",
        "    .manifest = bnncc_manifest, .weights = bnncc_weights,",
        f"    .weights_bytes = {manifest['weights_bytes']},",
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
API @_instance *@_create(void) { return @_create_on(NULL, -1); }
API @_instance *@_create_version(const char *version) { return @_create_on(version, -1); }
API @_instance *@_create_on(const char *version, int32_t device) {
  return (@_instance *)bnncc_create(&bnncc_model, version, device);
}
API void @_destroy(@_instance *self) { bnncc_destroy((Instance *)self); }
API const char *@_version(const @_instance *self) { return bnncc_version((const Instance *)self)->name; }
API int32_t @_device(const @_instance *self) { return bnncc_device((const Instance *)self); }
API int @_run(@_instance *self, const void *const *from, void *const *to) {
  return bnncc_run((Instance *)self, from, to);
}
API int @_run_device(@_instance *self, const void *const *from, void *const *to, void *stream) {
  return bnncc_run_device((Instance *)self, from, to, stream);
}
API void *@_stream(const @_instance *self) { return bnncc_stream((const Instance *)self); }
API int @_wait(@_instance *self, void *stream) { return bnncc_wait((Instance *)self, stream); }
API int @_synchronize(@_instance *self) { return bnncc_synchronize((Instance *)self); }
API int @_set_threads(@_instance *self, int32_t threads) { return bnncc_set_threads((Instance *)self, threads); }
API void *@_host_alloc(@_instance *self, size_t bytes) { return bnncc_host_alloc((Instance *)self, bytes); }
API void @_host_free(@_instance *self, void *memory) { bnncc_host_free((Instance *)self, memory); }
API void *@_device_alloc(@_instance *self, size_t bytes) { return bnncc_device_alloc((Instance *)self, bytes); }
API void @_device_free(@_instance *self, void *memory) { bnncc_device_free((Instance *)self, memory); }
API int @_copy(@_instance *self, void *to, const void *from, size_t bytes) {
  return bnncc_copy((Instance *)self, to, from, bytes);
}
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


def _version_tables(plan: Plan, on_host: bool, i: int) -> list[str]:
    """The tables of version `i`; its number ends their names."""
    shapes = [size for tensor in plan.tensors for size in tensor.shape]
    calls = [*plan.init, *plan.steps]
    return [
        f"static const int64_t shapes_{i}[] = {{{_list(shapes)}}};",
        f"static const int32_t arguments_{i}[] = {{{_list([arg for step in calls for arg in step.args])}}};",
        f"static const int32_t inputs_{i}[] = {{{_list(plan.inputs)}}}, outputs_{i}[] = {{{_list(plan.outputs)}}};",
        "",
        *_table("ModelTensor", f"tensors_{i}", _tensor_rows(plan.tensors, i)),
        *_table("ModelStep", f"steps_{i}", _step_rows(calls, on_host)),
    ]


def _device_tables(
    plan: Plan, device: DeviceCode | None, version: VersionEntry, code: tuple[Path, Path] | None, i: int
) -> list[str]:
    """The tables of what version `i` does on a GPU; none where it does nothing there."""
    entry = version["device"]
    if device is None or entry is None or code is None:
        return []
    launches = [launch for step in device.launches for launch in step]
    functions = sorted({launch.function for launch in launches})
    shared = {name: max(one.shared_bytes for one in launches if one.function == name) for name in functions}
    rows, at = [], 0
    for launch in launches:
        extents = ", ".join(f"{{{_list(extent)}}}" for extent in (launch.grid, launch.block))
        rows.append(f"{functions.index(launch.function)}, {extents}, {launch.shared_bytes}, {at}, {len(launch.args)}")
        at += len(launch.args)
    begins = [sum(len(step) for step in device.launches[:k]) for k in range(len(device.launches) + 1)]
    (major, minor), exact = architecture(device.sm)
    image, ptx = (
        _included(f".rodata.bnncc_{what}_{i}", f"bnncc_{what}_{i}", file.name, terminate=what == "ptx")
        for what, file in zip(("image", "ptx"), code, strict=True)
    )
    return [
        image,
        ptx,
        f'extern const unsigned char bnncc_image_{i}[] __attribute__((visibility("hidden")));',
        f'extern const char bnncc_ptx_{i}[] __attribute__((visibility("hidden")));',
        *_table("ModelFunction", f"functions_{i}", [f"{_string(name)}, {shared[name]}" for name in functions]),
        *_table("ModelLaunch", f"launches_{i}", rows),
        f"static const int32_t launch_arguments_{i}[] = {{{_list([arg for one in launches for arg in one.args])}}};",
        f"static const int32_t step_launches_{i}[] = {{{_list(begins)}}};",
        f"static const ModelDevice device_{i} = {{",
        f"    .major = {major}, .minor = {minor}, .exact = {int(exact)}, .driver = {entry['driver']},",
        f"    .image = bnncc_image_{i}, .ptx = bnncc_ptx_{i},",
        f"    .functions = functions_{i}, .launches = launches_{i}, .arguments = launch_arguments_{i},",
        f"    .step_launches = step_launches_{i}, .function_count = {len(functions)},",
        f"    .launch_count = {len(launches)}, .argument_count = {at},",
        "};",
        "",
    ]


def architecture(sm: str) -> tuple[tuple[int, int], bool]:
    """Of "sm_90": (major, minor), and whether its code runs on no other, as that of "sm_90a"."""
    match = re.fullmatch(r"sm_(\d+)(\d)([af]?)", sm)
    if match is None:
        raise ValueError(f"'{sm}' is no architecture of a GPU; sm_90 is one")
    return (int(match[1]), int(match[2])), bool(match[3])


def _version_row(plan: Plan, device: DeviceCode | None, version: VersionEntry, i: int) -> str:
    return ", ".join(
        [
            f".name = {_string(version['name'])}",
            f".required_features = {_string(' '.join(version['features']))}",
            ".backend = &bnncc_host" if device is None else f".backend = &bnncc_gpu, .device = &device_{i}",
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


def _step_rows(steps: Sequence[Step], on_host: bool) -> list[str]:
    rows, at = [], 0
    for step in steps:
        function = f"__tvm_ffi_{step.kernel}" if on_host else "NULL"
        rows.append(f"{_string(step.kernel)}, {function}, {at}, {len(step.args)}")
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
