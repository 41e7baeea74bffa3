"""How many blocks of a kernel a multiprocessor holds at a time, by the rules of NVIDIA's <cuda_occupancy.h>."""

from __future__ import annotations

from .descriptor import WARP, Architecture

#: Threads that a block may have, on every architecture.
MOST_THREADS = 1024

# Registers go to warps, in units; each of a multiprocessor's four parts has its own quarter of them.
_REGISTER_UNIT, _PARTS = 256, 4


def warps_by_registers(registers: int, registers_per_sm: int = 65536) -> int:
    """Warps whose threads use so many registers that a multiprocessor holds. registers_per_sm: alike from sm_75 on."""
    of_a_warp = -(-max(registers, 1) * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    return registers_per_sm // _PARTS // of_a_warp * _PARTS


def blocks_per_sm(gpu: Architecture, threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks of a kernel that a multiprocessor holds, 0 where it cannot run at all.

    threads: of a block. registers: of a thread. shared_bytes: static and dynamic.
    """
    warps = -(-threads // WARP)
    # Before sm_80 nothing is reserved.
    unit, reserved = (128, 1024) if gpu.capability >= (8, 0) else (256, 0)
    shared = -(-(shared_bytes + reserved) // unit) * unit
    by_registers = warps_by_registers(registers, gpu.registers_per_sm)
    if shared_bytes > gpu.most_shared or threads > MOST_THREADS or by_registers < -(-warps // _PARTS) * _PARTS:
        return 0
    return min(
        gpu.blocks_per_sm,
        gpu.threads_per_sm // WARP // warps,
        by_registers // warps,
        gpu.shared_per_sm // shared if shared else gpu.blocks_per_sm,
    )
