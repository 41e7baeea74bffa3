"""The targets whose code this machine can run."""

from __future__ import annotations

import pytest

from bnncc.targets.descriptor import TargetSpec

from .kernels import TARGETS


@pytest.fixture(params=TARGETS, scope="module")
def target(request: pytest.FixtureRequest) -> TargetSpec:
    return TARGETS[request.param]
