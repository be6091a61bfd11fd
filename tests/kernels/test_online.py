"""The online filter's kernel against the reference and against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    FEWER,
    KERNEL_CASES,
    LAYOUTS,
    MARKS,
    ON_GPU,
    assert_audit,
    laid_out,
    on_cpu,
    on_device,
)
from support import Case, Inputs, achieved, by_query_tile, cases, control, oracle, same_bits, target

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels import reference as ref

pytestmark = MARKS

WAYS = {
    "mean": {"certify": "mean"},
    "row": {"certify": "row"},
    "mean bound": {"certify": "mean", "bound": True},
    "row bound": {"certify": "row", "bound": True},
    "share": {"certify": "none"},
    "share bound": {"certify": "none", "bound": True},
    "lse": {"rule": "lse", "certify": "none"},
    "lse bound": {"rule": "lse", "certify": "none", "bound": True},
    "max": {"rule": "max", "certify": "none"},
    "max bound": {"rule": "max", "certify": "none", "bound": True},
}
CONTROLS = st.one_of(
    st.builds(control, st.sampled_from([0.3, 0.7, 0.9, 1.0])),
    st.builds(control, st.just(0.8), log2=st.sampled_from([-6.0, -3.0, -1.0])),
)


CASES = KERNEL_CASES
if ON_GPU:  # KERNEL_CASES have two widths, which the hopper engine does not compute
    CASES |= cases(
        q_len=st.sampled_from([1, 65, 128, 129, 200]),
        kv_len=st.sampled_from([1, 64, 65, 128, 200, 257, 700]),
        head_dim=st.just(64),
        value_dim=st.just(64),
    )
ENGINES = [None, "triton"] if ON_GPU else [None]
"""None is the hopper engine where that can compute a call, and elsewhere the other."""


def online(x: Inputs, numbers: torch.Tensor, **options) -> launch.Output:
    return launch.online(x.q, x.k, x.v, numbers.to(DEVICE), **x.options, **options)


@FEWER
@given(
    case=CASES,
    numbers=CONTROLS,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    way=st.sampled_from(sorted(WAYS)),
    engine=st.sampled_from(ENGINES),
)
def test_online(
    case: Case,
    numbers: torch.Tensor,
    dtype: torch.dtype,
    layout: str,
    way: str,
    engine: str | None,
) -> None:
    """Decisions are the reference's, unless one was so near that rounding turned it."""
    x = laid_out(on_device(case.make(dtype)), layout)
    got = online(x, numbers, **WAYS[way], engine=engine)
    again = online(x, numbers, **WAYS[way], engine=engine)  # a race would show as other bits
    assert same_bits(got.out, again.out)
    assert same_bits(got.row_recall, again.row_recall)
    x = on_cpu(x)
    wanted = ref.online(x.q, x.k, x.v, numbers, **x.options, **WAYS[way])
    dense = oracle(x)
    out, lse, recall = got.out.cpu(), got.lse.cpu(), got.row_recall.cpu()
    assert out.transpose(1, 2).is_contiguous()

    # Whatever was dropped: the ledger is what was achieved (or below it), and the output errs by no
    # more than what was lost.
    seen = dense.lse != -torch.inf
    found = achieved(lse, dense)
    slack = 4 * dense.rounding + 1e-5
    ledger = torch.where(seen, found - recall, 0)
    assert (ledger >= -slack).all()
    if not WAYS[way].get("bound"):
        assert (ledger <= slack).all()
    lost = torch.where(seen, 1 - found, 0)[..., None]
    v = x.v.double()
    spread = (v.amax(2, True) - v.amin(2, True)).repeat_interleave(x.q.shape[1] // v.shape[1], 1)
    eps = torch.finfo(dtype).eps
    allowed = lost * spread + (slack[..., None] + 4 * eps) * v.abs().amax()
    assert ((out.double() - dense.out).abs() <= allowed).all()
    assert (lse == -torch.inf).equal(~seen)

    same = got.count.cpu().long().equal(wanted.kept.sum(-1))
    if same:
        measures, theirs = got.measures.cpu(), wanted.measures
        measures, theirs = measures[: c.MEASURE_ENGINE], theirs[: c.MEASURE_ENGINE]
        torch.testing.assert_close(measures, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    # Ties are what integers and constants are made of; elsewhere they are rare.
    assert same or case.family in ("integers", "constant") or dtype != torch.float32
    assert not got.histogram.any()


@FEWER
@given(
    case=CASES,
    recall=st.sampled_from([0.3, 0.7, 0.9, 0.97]),
    dtype=st.sampled_from(DTYPES),
    way=st.sampled_from(["mean", "row", "mean bound", "row bound"]),
)
def test_certificate(case: Case, recall: float, dtype: torch.dtype, way: str) -> None:
    """Recall measured from outside is never below the promise: of each query tile, or each row."""
    x = on_device(case.make(dtype))
    numbers = control(recall)
    got = online(x, numbers, **WAYS[way])
    dense = oracle(on_cpu(x))
    seen = dense.lse != -torch.inf
    assume(seen.any())
    found = torch.where(seen, achieved(got.lse.cpu(), dense), 1)
    slack = 4 * dense.rounding + 1e-6
    if WAYS[way]["certify"] == "mean":
        rows = zip(by_query_tile(found), by_query_tile(slack), strict=True)
        assert all((f.mean(-1) >= target(numbers) - s.amax(-1)).all() for f, s in rows)
    else:
        assert (found >= target(numbers) - slack).all()


@pytest.mark.parametrize("engine", ENGINES)
@FEWER
@given(case=CASES, dtype=st.sampled_from(DTYPES))
def test_full_recall_drops_nothing(case: Case, dtype: torch.dtype, engine: str | None) -> None:
    """At recall 1 every way is the same kernel with the filter out of it, bitwise."""
    x = on_device(case.make(dtype))
    every = [
        online(x, control(1.0), **WAYS[way], engine=engine) for way in ("mean", "share", "max")
    ]
    assert all(same_bits(every[0].out, other.out) for other in every[1:])
    assert all(same_bits(every[0].lse, other.lse) for other in every[1:])
    assert (every[0].row_recall == 1).all()
    assert every[0].measures[c.MEASURE_DENSITY] == 1


@FEWER
@given(case=CASES, dtype=st.sampled_from(DTYPES), engine=st.sampled_from(ENGINES))
def test_hidden_keys_never_matter(case: Case, dtype: torch.dtype, engine: str | None) -> None:
    x = on_device(case.make(dtype))
    assume(x.mask is not None)
    spoilt = x.spoil_hidden()
    got, wanted = (online(inputs, control(0.8), engine=engine) for inputs in (spoilt, x))
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.row_recall, wanted.row_recall)


def test_nan_row_stays_alone() -> None:
    x = Case(q_len=200, kv_len=257).make(torch.float16)
    x.q[0, 0, 3] = torch.nan
    got = online(on_device(x), control(0.7))
    spoilt = torch.zeros(1, 1, 200, dtype=torch.bool)
    spoilt[0, 0, 3] = True
    assert got.out.cpu().isnan().any(-1).equal(spoilt)
    assert got.count[0, 0, 0] == c.tiles(257, c.BLOCK_N)
    assert got.measures[c.MEASURE_ESTIMATE].isnan()


@pytest.mark.parametrize("way", ["mean", "lse", "row bound"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_audit(way: str, dtype: torch.dtype) -> None:
    """The error of every way; the recall only where the ledger holds bounds of it."""
    x = on_device(Case(family="spiky", q_len=200, kv_len=577, kv_heads=2).make(dtype))
    numbers = control(0.7)
    got = online(x, numbers, **WAYS[way], audited=True)
    assert assert_audit(got, on_cpu(x), 0).error > 0
    plain = online(x, numbers, **WAYS[way])
    assert same_bits(got.out, plain.out)
    assert plain.measures[c.MEASURE_ERROR : c.MEASURE_ENGINE].isnan().all()
    if way == "row bound":
        assert plain.measures[c.MEASURE_RECALL].isnan()
        recall = got.measures[c.MEASURE_RECALL].item()
        assert got.measures[c.MEASURE_ESTIMATE].item() <= recall + 1e-5
    else:
        assert same_bits(got.measures[: c.MEASURE_ERROR], plain.measures[: c.MEASURE_ERROR])


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 65), (65, 0), (0, 0)])
@pytest.mark.parametrize("way", ["mean", "lse"])
def test_empty(q_len: int, kv_len: int, way: str) -> None:
    x = on_device(Case(batch=2, q_len=q_len, kv_len=kv_len).make(torch.float16))
    got = online(x, control(0.5), **WAYS[way])
    assert got.out.shape == (2, 1, q_len, 8)
    assert not got.out.any()
    assert (got.lse == -torch.inf).all()
    assert (got.row_recall == 1).all()
    assert got.measures[:2].tolist() == [1, 1]


def test_refuses_unknown_options() -> None:
    x = on_device(Case().make(torch.float32))
    with pytest.raises(ValueError, match="rule must be one of"):
        online(x, control(), rule="threshold")
    with pytest.raises(ValueError, match="certify must be one of"):
        online(x, control(), certify="always")
    with pytest.raises(ValueError, match="engine must be one of"):
        online(x, control(), engine="fa4")
