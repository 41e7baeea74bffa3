"""What belongs to the grids as a whole: the seed of the random points, printed, and quiet failures."""

import logging
import os
import secrets

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # In the environment, because worker processes must draw the same points; they never choose a seed of their own.
    if not hasattr(config, "workerinput"):
        os.environ.setdefault("SEED", str(secrets.randbelow(1 << 31)))
    # torch.export logs megabytes of trace, which pytest would print with a failure.
    logging.getLogger("torch.__trace").propagate = False


def pytest_report_header(config: pytest.Config) -> str:
    return f"random points: SEED={os.environ['SEED']}"
