"""What the kernels in Gluon compute, without a GPU: their groups of warps are threads here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from gluon_threads import load
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_cases import (
    FEWER,
    assert_output,
    assert_plan,
    attend_on_threads,
    drawn_tiles,
    laid_out,
    lists_of,
    spoilt,
)
from support import Case, Inputs, achieved, cases, control, oracle, same_bits, visible_tiles
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref
from cef_compile.kernels.ranks import variance_factor

CASES = cases(
    q_len=st.sampled_from([1, 65, 128, 129, 300]),
    kv_len=st.sampled_from([1, 65, 200, 700, 1300]),
    head_dim=st.just(64),
    value_dim=st.just(64),
)
OTHER_DIMS = cases(
    q_len=st.sampled_from([129]),
    kv_len=st.sampled_from([65, 1300]),
    head_dim=st.sampled_from([40, 96, 128]),
    value_dim=st.sampled_from([24, 72, 128]),
)
HALF = torch.float16
HALVES = st.sampled_from([HALF, torch.bfloat16])


@given(
    case=CASES | OTHER_DIMS,
    dtype=HALVES,
    layout=st.sampled_from(["bhsd", "bshd"]),
    density=st.sampled_from([1.0, 0.7, 0.2]),
)
def test_attention_over_lists(case: Case, dtype: torch.dtype, layout: str, density: float) -> None:
    x = laid_out(case.make(dtype), layout)
    y = spoilt(x)
    kept = drawn_tiles(case, x, density)
    out, lse = attend_on_threads(y.q, y.k, y.v, kept, x)
    assert_output(x, kept, SimpleNamespace(out=out, lse=lse), compensate=False)


@FEWER
@given(case=CASES | OTHER_DIMS, dtype=HALVES)
@example(case=Case(q_len=70, kv_len=83_000, head_dim=64, seed=3, mask="lengths"), dtype=HALF)
def test_plan(case: Case, dtype: torch.dtype) -> None:
    """It is the reference's; of the many keys of one case some scores are computed twice."""
    x = case.make(dtype)
    known = ref.centroids(x.k, x.mask)
    beside = (0, c.padded_dim(case.head_dim) - case.head_dim)
    parts = (known.mean, known.variance * variance_factor(x.scale))
    stats = torch.cat([torch.nn.functional.pad(part, beside) for part in parts], -1).to(dtype)
    ranked = load("hopper_plan").plan(
        x.q, stats, known.count.int(), scale=x.scale, keep_energy=True
    )
    assert_plan(x, ranked)


WAYS = st.builds(
    dict,
    rule=st.sampled_from(c.ONLINE_RULES),
    certify=st.sampled_from(c.CERTIFICATES),
    bound=st.booleans(),
)
CONTROLS = st.one_of(
    st.builds(control, st.sampled_from([0.3, 0.7, 0.9, 1.0])),
    st.builds(control, st.just(0.8), log2=st.sampled_from([-6.0, -3.0, -1.0])),
)


@given(case=CASES, dtype=HALVES, way=WAYS, numbers=CONTROLS)
@example(
    case=Case(q_len=130, kv_len=300, head_dim=128, seed=5), dtype=HALF,
    way={"rule": "share", "certify": "mean", "bound": False}, numbers=control(0.8),
)  # fmt: skip
def test_what_the_online_filter_keeps(
    case: Case, dtype: torch.dtype, way: dict[str, Any], numbers: Tensor
) -> None:
    """Decisions and ledger are the reference's."""
    x = case.make(dtype)
    given = spoilt(x)
    judged, recall, kept, sums = judge(given.q, given.k, numbers, x, **way)
    wanted = ref.online(x.q, x.k, x.v, numbers, **x.options, **way)
    dense = oracle(x)
    slack = 4 * dense.rounding + 1e-5
    assert sums[0] == kept.sum()
    assert (judged != 0).sum(-1).equal(kept.long())
    found = kept_recall(x, judged != 0)
    seen = dense.lse != -torch.inf
    assert (torch.where(seen, found - recall, 0) >= -slack).all()
    same = (judged != 0).equal(wanted.kept)
    # Far from 0 scores are rounded to a thousandth, so that near ties are ties.
    ties = ("integers", "constant", "deep_negative")
    assert same or case.family in ties, "ties are rare elsewhere"
    whole = lists_of(wanted.kept, x)[1][1]
    if same:
        assert (judged == c.JUDGED_WHOLE).sum(-1).equal(whole.long())
        assert wanted.row_recall is not None
        assert ((recall - wanted.row_recall).abs() <= slack).all()


@FEWER
@given(case=CASES, gaps=st.integers(0, 70))
def test_queries_in_a_token_order(case: Case, gaps: int) -> None:
    """Rows of q are read and written where an order says, which has places without one."""
    x = case.make(torch.float16)
    draw = torch.Generator().manual_seed(case.seed)
    places = torch.randperm(case.q_len + gaps, generator=draw)[: case.q_len]
    tokens = torch.full((case.q_len + gaps,), -1, dtype=torch.int32)
    tokens[places] = torch.arange(case.q_len, dtype=torch.int32)
    moved = x.q.new_zeros(*x.q.shape[:2], len(tokens), x.q.shape[3])
    moved[:, :, places] = x.q
    n_m, n_n = c.tiles(len(tokens), c.BLOCK_M), c.tiles(case.kv_len, c.BLOCK_N)
    kept = visible_tiles(x)[:, None, None].expand(-1, case.heads, n_m, n_n)
    got = attend_on_threads(x.q, x.k, x.v, kept, x, tokens=tokens)
    wanted = attend_on_threads(moved, x.k, x.v, kept, x)
    assert all(same_bits(g, w[:, :, places]) for g, w in zip(got, wanted, strict=True))

    way = {"rule": "share", "certify": "mean", "bound": False}
    judged, recall, _, _ = judge(x.q, x.k, control(0.8), x, tokens=tokens, **way)
    _, lse = ref.attend(moved.double(), x.k.double(), x.v.double(), judged != 0, x.scale, x.mask)
    dense = oracle(x)
    off = torch.where(dense.lse == -torch.inf, 0, achieved(lse[:, :, places], dense) - recall)
    assert (off.abs() <= 4 * dense.rounding + 1e-5).all()


@FEWER
@given(case=CASES, rule=st.sampled_from(c.ONLINE_RULES))
def test_exact_tiles_are_kept(case: Case, rule: str) -> None:
    """All that a query tile from the first exact one on sees, and exact key tiles of the others."""
    x = case.make(torch.float16)
    n_m, n_n = c.tiles(case.q_len, c.BLOCK_M), c.tiles(case.kv_len, c.BLOCK_N)
    visible = visible_tiles(x)
    way = {"rule": rule, "certify": "none", "bound": True}
    numbers = control(0.5, log2=40.0)  # lets everything go that may
    kept = judge(x.q, x.k, numbers, x, exact_tiles=(n_m - 1, n_n - 1), **way)[2]
    all_of_them = visible.sum(-1)[:, None].expand(-1, case.heads)
    assert kept[..., -1].equal(all_of_them.int())
    assert (kept[..., :-1] >= visible[:, -1:, None].int()).all()


def judge(
    q: Tensor, k: Tensor, numbers: Tensor, x: Inputs, **way: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    even = c.BLOCK_N / max(x.k.shape[2], 1)
    return load("hopper_judge").judge(
        q, k, numbers, scale=x.scale, even=even, key_mask=x.mask, **way
    )


def kept_recall(x: Inputs, kept: Tensor) -> Tensor:
    """Of each row, from outside: kept energy over all energy."""
    _, lse = ref.attend(x.q.double(), x.k.double(), x.v.double(), kept, x.scale, x.mask)
    return achieved(lse, oracle(x))
