"""Binary products in assembler, in an order for AArch64 processors that execute in order.

    sums[pixel, channel, :] += popcount(x[pixel, step, :] ^ w[channel, step, :])        vectors of 16 bytes

LLVM knows these processors, but not when to stop: it loads several steps ahead until sums are spilled, or copies sums
from register to register. What a Cortex-A53 wants is little: it finishes in order what it began, so that a load, which
takes less time than arithmetic, waits behind it, and a branch longer still. Hence all loads of a step come first, and
after them independent instructions in runs at least as long as their latency; several steps make up one iteration of
the loop. A vector that the step before has loaded is not loaded again: neighbouring pixels of a row share most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

#: Vector registers.
_REGISTERS = 32
#: Independent instructions of a run: more than their latency of 6 cycles on a Cortex-A53, few enough for the registers.
_RUN = 8
#: Distances that two instructions add to a pointer.
_FAR = 1 << 24

#: Where a vector lies: number of a pointer, and bytes behind it.
Place = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """A step of the reduction: the vectors of x by pixel, those of w by channel."""

    pixels: tuple[Place, ...]
    channels: tuple[Place, ...]


@dataclass(frozen=True)
class Loop:
    """A loop around steps. strides: bytes from one iteration to the next, by pointer."""

    iterations: int
    strides: tuple[int, ...]


def can_reach(offset: int) -> bool:
    """Whether LDR takes that many bytes behind a pointer."""
    return 0 <= offset < 1 << 16 and offset % 16 == 0


def llvm_function(loops: Sequence[Loop], steps: Sequence[Step], pointers: int) -> tuple[str, str] | None:
    """Name and LLVM text of a function (ptr sums, ptr …) for such loops, the outermost first, around such steps.

    pointers: how many of them places name. The sums lie behind each other, the channels of a pixel together.
    None where the registers do not hold all that, or a pointer would move too far.
    """
    sums = len(steps[0].pixels) * len(steps[0].channels)
    writer = _Writer(sums)
    for step in steps:
        writer.step(step)
    registers = sums + writer.most
    if registers > _REGISTERS or any(abs(stride) >= _FAR // 2 for loop in loops for stride in loop.strides):
        return None
    # Operands: vectors, of which the first are sums, pointers, counters; the sums and pointers once more, as input.
    counters = registers + pointers
    lines = [line.replace("[p", "[$p") for line in writer.lines]
    for number, loop in reversed(list(enumerate(loops))):
        lines = _looped(number, loop, lines, loops[number + 1 :], counters + number)
    for pointer in range(pointers):
        lines = [line.replace(f"$p{pointer}]", f"${registers + pointer}]") for line in lines]
        lines = [line.replace(f"$p{pointer},", f"${registers + pointer},") for line in lines]
    outputs = ["=&w"] * registers + ["=&r"] * (pointers + len(loops))
    inputs = [*range(sums), *range(registers, counters)]
    types = ["<16 x i8>"] * registers + ["ptr"] * pointers + ["i64"] * len(loops)
    constraints = ",".join([*outputs, *map(str, inputs), "~{cc}", "~{memory}"])
    values = [f"<16 x i8> %in{n}" for n in range(sums)] + [f"ptr %p{n}" for n in range(pointers)]
    code = "\\0A".join(lines)
    result = f"{{ {', '.join(types)} }}"
    body = []
    for n in range(sums):
        body += [
            f"%at{n} = getelementptr i8, ptr %sums, i64 {16 * n}",
            f"%in{n} = load <16 x i8>, ptr %at{n}, align 16",
        ]
    body.append(f'%out = call {result} asm sideeffect "{code}", "{constraints}"({", ".join(values)})')
    for n in range(sums):
        body += [f"%new{n} = extractvalue {result} %out, {n}", f"store <16 x i8> %new{n}, ptr %at{n}, align 16"]
    text = "\n  ".join([*body, "ret i32 0"])
    name = f"bnncc_steps_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    parameters = ", ".join(["ptr %sums", *(f"ptr %p{n}" for n in range(pointers))])
    # Every kernel that calls it brings it along, and all of them are alike.
    return name, f"define linkonce_odr hidden i32 @{name}({parameters}) alwaysinline {{\n  {text}\n}}\n"


def _looped(number: int, loop: Loop, lines: list[str], inside: Sequence[Loop], counter: int) -> list[str]:
    """A loop around lines; its pointers stand where the loops inside have left them."""
    label = f".Lbnncc_steps${{:uid}}_{number}"
    moves = []
    for pointer, stride in enumerate(loop.strides):
        moves += _moved(pointer, stride - (inside[0].iterations * inside[0].strides[pointer] if inside else 0))
    again = [f"subs ${counter}, ${counter}, #1", f"b.ne {label}"]
    return [f"mov ${counter}, #{loop.iterations}", f"{label}:", *lines, *moves, *again]


def _moved(pointer: int, distance: int) -> list[str]:
    name, size = ("add", distance) if distance >= 0 else ("sub", -distance)
    parts = [f"#{size & 0xFFF}"] * bool(size & 0xFFF) + [f"#{size >> 12}, lsl #12"] * bool(size >> 12)
    return [f"{name} $p{pointer}, $p{pointer}, {part}" for part in parts]


@dataclass
class _Writer:
    """The instructions of steps. most: registers beside the sums. held: what lies in which of them."""

    sums: int
    lines: list[str] = field(default_factory=list)
    most: int = 0
    free: list[int] = field(default_factory=list)
    held: dict[Place, int] = field(default_factory=dict)

    def step(self, step: Step) -> None:
        wanted = dict.fromkeys((*step.pixels, *step.channels))
        for place in [p for p in self.held if p not in wanted]:
            self.free.append(self.held.pop(place))
        self._load([place for place in wanted if place not in self.held])
        products = [(p, c) for c in range(len(step.channels)) for p in range(len(step.pixels))]
        runs = -(-len(products) // _RUN)
        length = -(-len(products) // runs)
        for start in range(0, len(products), length):
            self._run(step, products[start : start + length])

    def _load(self, places: list[Place]) -> None:
        while places:
            pointer, offset = first = places.pop(0)
            address = f"[p{pointer}, #{offset}]" if offset else f"[p{pointer}]"
            register = self.held[first] = self._register()
            if places and places[0] == (pointer, offset + 16) and offset <= 1008:
                second = self.held[places.pop(0)] = self._register()
                self.lines.append(f"ldp ${{{register}:q}}, ${{{second}:q}}, {address}")
            else:
                self.lines.append(f"ldr ${{{register}:q}}, {address}")

    def _run(self, step: Step, products: list[tuple[int, int]]) -> None:
        into = []
        for pixel, channel in products:
            place = step.channels[channel]
            x, w = self.held[step.pixels[pixel]], self.held[place]
            # With its last product a channel's weights have served.
            into.append(self.held.pop(place) if pixel == len(step.pixels) - 1 else self._register())
            self.lines.append(f"eor ${into[-1]}.16b, ${x}.16b, ${w}.16b")
        self.lines += [f"cnt ${register}.16b, ${register}.16b" for register in into]
        for register, (pixel, channel) in zip(into, products, strict=True):
            total = pixel * len(step.channels) + channel
            self.lines.append(f"add ${total}.16b, ${total}.16b, ${register}.16b")
        self.free += into

    def _register(self) -> int:
        """The register that has been free for longest."""
        if self.free:
            return self.free.pop(0)
        self.most += 1
        return self.sums + self.most - 1
