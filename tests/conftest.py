"""What all tests share."""

import os

import pytest

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


@pytest.fixture(scope="session")
def with_drawn_norms():
    """A function: draws the numbers of a model's batch norms, and returns the model in evaluation mode."""
    from torch import nn

    def draw(model):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean, std=3)
                nn.init.uniform_(module.running_var, 0.5, 20)
        return model.eval()

    return draw
