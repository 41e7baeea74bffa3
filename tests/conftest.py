"""What all tests share."""

import os

try:
    import torch
except ImportError:  # on a machine that has a GPU for tests/gpu and nothing else
    torch = None  # type: ignore[assignment]

# What is tested is what this checkout compiles, not what an earlier run left.
os.environ["BNNCC_CACHE"] = "off"
os.environ["BNNCC_TUNING"] = "off"

# pytest-xdist runs a process per core; torch would start as many threads in each, to wait for each other.
if torch:
    torch.set_num_threads(1)
