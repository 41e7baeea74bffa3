"""What all tests share."""

import torch

# pytest-xdist runs a process per core; torch would start as many threads in each, to wait for each other.
torch.set_num_threads(1)
