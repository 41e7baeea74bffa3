"""Tests on a GPU, of what `python -m benchmarks.cuda build OUTDIR` compiled, on this machine or elsewhere.

    pytest tests/gpu --artifacts OUTDIR

needs NumPy, pytest and the NVIDIA driver; torch is used where it is there. Elsewhere all of it is skipped, with the
reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import cuda_folder
from benchmarks.cuda_device import Gpu, missing

from .built import Built


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--artifacts", metavar="OUTDIR", help="what `python -m benchmarks.cuda build OUTDIR` wrote")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = missing()
    if not reason and _folder(config) is None:
        reason = "no artifacts: python -m benchmarks.cuda build OUTDIR, then --artifacts OUTDIR"
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _folder(config: pytest.Config) -> Path | None:
    # Where pytest was not started on this folder, it did not know the option yet when it read the command line.
    given = config.getoption("--artifacts", default=None) or os.environ.get("BNNCC_GPU_ARTIFACTS")
    return Path(given) if given else None


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest) -> Iterator[Built]:
    folder = _folder(request.config)
    assert folder is not None  # else the test is skipped
    with cuda_folder.opened(folder) as (files, index):
        yield Built(files, index)


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    return Gpu()
