"""The scaling model of the docs: its rates are sane, and it keeps to what was measured."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCALING = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "scaling.py"))
RATES = SCALING["rates"]()
estimate = SCALING["estimate"]
TOKENS = st.integers(1 << 12, 1 << 20)
GPUS = st.sampled_from([1, 2, 4, 8])


@given(TOKENS, GPUS)
def test_filtering_changes_attention_alone(tokens: int, gpus: int) -> None:
    dense, filtered = (estimate(RATES, tokens, gpus, way) for way in (False, True))
    assert (filtered.rest, filtered.exchange) == (dense.rest, dense.exchange)
    assert dense.attention / filtered.attention == pytest.approx(RATES.gain)


@given(TOKENS, GPUS, st.booleans())
def test_more_gpus_share_the_work_and_pay_the_exchange(
    tokens: int, gpus: int, filtered: bool
) -> None:
    one, many = (estimate(RATES, tokens, n, filtered) for n in (1, gpus))
    assert one.exchange == 0
    assert many.attention + many.rest == pytest.approx(one.total / gpus)
    assert many.total >= one.total / gpus


def test_it_is_within_a_tenth_of_what_was_measured() -> None:
    off = [float(row[-1].removesuffix(" %")) for row in SCALING["checked"]()]
    assert len(off) == 8
    assert max(map(abs, off)) < 10
