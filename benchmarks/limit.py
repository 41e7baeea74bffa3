"""What this machine's vector units can do at best: the xor, popcount and add of a binary product, from registers.

A few lines of C, compiled for this CPU by the same clang that links artifacts; no memory is touched, so no kernel can
be faster. Vectors of 64 bytes become whatever registers the CPU has.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_SOURCE = r"""
typedef unsigned WORD __attribute__((vector_size(64)));

unsigned limit(long rounds) {
    WORD x = {1}, w[8], sum[8] = {0};
    for (int i = 0; i < 8; i++) w[i] = x * (unsigned)(i + 3);
    for (long r = 0; r < rounds; r++) {
        for (int i = 0; i < 8; i++) {
            /* The compiler must not see that x stays the same, or it multiplies instead. */
            __asm__ volatile("" : "+m"(x));
            sum[i] += __builtin_elementwise_popcount(x ^ w[i]);
        }
    }
    unsigned total = 0;
    for (int i = 0; i < 8; i++) for (int lane = 0; lane < 16; lane++) total += sum[i][lane];
    return total;
}
"""
_MACS_PER_ROUND = 8 * 512


def binary_limit() -> float:
    """Billions of binary operations per second on one core, two for every multiply-accumulate; median of 15 runs."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "limit.c", Path(folder) / "limit.so"
        source.write_text(_SOURCE)
        command = [sys.executable, "-m", "ziglang", "cc", "-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", str(library), str(source)], check=True)
        run = ctypes.CDLL(str(library)).limit
        run.argtypes, run.restype = [ctypes.c_long], ctypes.c_uint
        rounds = 200_000
        times = []
        for _ in range(15):
            start = time.process_time()
            run(rounds)
            times.append(time.process_time() - start)
    return 2e-9 * _MACS_PER_ROUND * rounds / statistics.median(times)
