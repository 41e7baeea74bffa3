"""Turns CUDA C, as TVM generates it, into C++ against cuda_on_cpu.h."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .asm import replace_asm
from .errors import EmulationError

_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+(?:void\s+)?(?:__launch_bounds__\(\s*(\d+)[^)]*\)\s*)?(?:void\s+)?(\w+)\(([^)]*)\)\s*([;{])'
)
_SHARED = re.compile(
    r"(extern\s+)?__shared__\s+(?:(?:alignas|__align__)\((\d+)\)\s*)?((?:unsigned\s+|signed\s+)?\w+(?:\s+long)?)\s+"
    r"(?:(?:alignas|__align__)\((\d+)\)\s*)?(\w+)\[([\w\s*+-]*)\]((?:\[\w+\])*)\s*;"
)
_HELPER = re.compile(r"(__forceinline__\s+__device__\s+void\s+tvm_builtin_ptx_\w+\([^)]*)(\)\s*\{)")
_ACCESS = re.compile(r"\*\(\s*((?:const\s+)?\w+)\s*\*\s*\)\(")  # *(uint4*)(…): the pointer's alignment is looked at
_SIZES = {
    **dict.fromkeys(("char", "uchar", "signed char", "unsigned char", "int8_t", "uint8_t", "bool"), 1),
    **dict.fromkeys(("short", "ushort", "unsigned short", "int16_t", "uint16_t", "half", "__half", "nv_bfloat16"), 2),
    **dict.fromkeys(("int", "uint", "unsigned", "unsigned int", "float", "int32_t", "uint32_t"), 4),
    **dict.fromkeys(("half2", "__half2", "char4", "uchar4", "short2"), 4),
    **dict.fromkeys(("double", "int64_t", "uint64_t", "long long", "unsigned long long", "int2", "uint2", "float2"), 8),
    **dict.fromkeys(("int4", "uint4", "float4", "longlong2", "ulonglong2", "double2"), 16),
}
_MOST_SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of a block


@dataclass(frozen=True)
class Kernel:
    """parameters: their C types. shared_bytes: static. most_threads: of __launch_bounds__, 0 without."""

    name: str
    parameters: tuple[str, ...]
    shared_bytes: int
    most_threads: int


def translate(source: str, arch: str) -> tuple[str, list[Kernel]]:
    """C++ of the kernels, line by line as the source, and what they are."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    if number not in _MOST_SHARED:
        raise EmulationError(f"architecture {arch} is not known: {', '.join(f'sm_{n}' for n in _MOST_SHARED)}")
    kernels: list[Kernel] = []
    pieces: list[str] = []
    position = 0
    for match in _KERNEL.finditer(source):
        if match[4] == ";":
            continue
        end = _closing(source, match.end() - 1)
        body, shared = _place_shared(source[match.end() : end])
        pieces += [source[position : match.end()], " EMU_KERNEL_BEGIN ", body]
        position = end
        parameters = tuple(_parameter_type(p) for p in match[3].split(",") if p.strip())
        kernels.append(Kernel(match[2], parameters, shared, int(match[1] or 0)))
    text = "".join([*pieces, source[position:]])
    if "__shared__" in text:
        raise EmulationError(f"shared memory is not understood: {text[text.index('__shared__') :].splitlines()[0]}")
    # The line of an instruction is that of the helper's caller.
    text = _ACCESS.sub(r"*emu::at<\1>(", text)
    text = replace_asm(_HELPER.sub(r"\1, int emu_line = __builtin_LINE()\2", text).replace("(, int emu", "(int emu"))
    return _program(text, kernels, number), kernels


def _closing(source: str, opening: int) -> int:
    """Where the brace closes. Generated code has no braces in strings outside asm, where they come in pairs."""
    depth = 0
    for match in re.finditer(r"[{}]", source[opening:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return opening + match.start()
    raise EmulationError("a brace does not close")


def _parameter_type(parameter: str) -> str:
    text = re.sub(r"\b(__restrict__|__grid_constant__|const)\b", " ", parameter)
    return " ".join(re.sub(r"\w+\s*$", "", text.strip()).split())


def _place_shared(body: str) -> tuple[str, int]:
    """Shared arrays become references into the block's memory. Also returns the bytes of the static ones."""
    used = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal used
        extern, before, kind, after, name, count, more = match.groups()
        kind = " ".join(kind.split())
        if extern:
            return f"{kind}* const {name} = ({kind}*)emu_dynamic_shared();"
        if kind not in _SIZES:
            raise EmulationError(f"shared array {name} has elements of unknown size: {kind}")
        alignment = max(int(before or 1), int(after or 1), _SIZES[kind])
        used = -(-used // alignment) * alignment
        extents = [count, *re.findall(r"\[(\w+)\]", more)]
        size = _SIZES[kind]
        for extent in extents:
            size *= int(extent)
        place, used = used, used + size
        dimensions = "".join(f"[{extent}]" for extent in extents)
        return f"{kind} (&{name}){dimensions} = *({kind} (*){dimensions})emu_shared({place});"

    return _SHARED.sub(replace, body), used


def _program(text: str, kernels: list[Kernel], number: int) -> str:
    lines = [f"#define __CUDA_ARCH__ {number * 10}", '#include "cuda_on_cpu.h"', '#line 1 "kernels.cu"', text, ""]
    entries = []
    for i, k in enumerate(kernels):
        values = ", ".join(f"*({t}*)p[{j}]" for j, t in enumerate(k.parameters))
        quiet = "__attribute__((disable_sanitizer_instrumentation))"
        lines.append(f"{quiet} static void emu_enter_{i}(void** p) {{ (void)p; {k.name}({values}); }}")
        entries.append(f'{{"{k.name}", emu_enter_{i}, {k.shared_bytes}, {k.most_threads}, {len(k.parameters)}}}')
    lines.append(f"extern const emu_kernel emu_kernels[] = {{{', '.join(entries)}}};")
    lines.append(f"extern const uint32_t emu_kernel_count = {len(kernels)};")
    lines.append(f"extern const uint32_t emu_most_shared = {_MOST_SHARED[number] * 1024};")
    return "\n".join(lines)
