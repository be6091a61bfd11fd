"""Hypothesis profiles: ``ci`` by default, ``nightly`` with HYPOTHESIS_PROFILE=nightly."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # The kernel tests run in Triton's interpreter, and Triton reads this when it is imported,
    # which Dynamo does in any other test.
    os.environ["TRITON_INTERPRET"] = "1"

_COMMON = {
    # The first example of a shape pays for warming up: no deadline can be right.
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("ci", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=2000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Dynamo without what other tests compiled: diffusers' models share code and its limits.

    Weights drawn in the test are the same in every run.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
