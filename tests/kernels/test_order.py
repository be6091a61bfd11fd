"""Token order in the kernels, against the same order in torch and against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    FEWER,
    LAYOUTS,
    MARKS,
    ON_GPU,
    assert_centroids,
    laid_out,
    on_cpu,
    on_device,
)
from order_cases import layout_cases, permuted
from support import Case, Inputs, achieved, control, oracle, same_bits

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels import reference as ref
from cef_compile.kernels.centroids import arrange, centroids, in_order
from cef_compile.kernels.order import Layout, token_order

pytestmark = MARKS

# The interpreter takes a second for a kilotoken: few and short sequences, each of another kind.
LEAST = settings(max_examples=max(6, settings.default.max_examples // 8))
SHORT = st.builds(
    lambda before, grid, after: Layout(before, *grid, after),
    st.sampled_from([0, 7]),
    st.sampled_from([(1, 13, 17), (5, 6, 7), (3, 5, 11), (2, 3, 11)]),
    st.sampled_from([0, 70]),
)
CASES = layout_cases(SHORT, head_dim=16, kv_heads=1)
FILTERS = {
    "planned": (launch.planned, {}),
    "compensated": (launch.planned, {"compensate": True}),
    "top_k": (launch.planned, {"rule": "top_k"}),
    "top_p": (launch.planned, {"rule": "top_p"}),
    "online": (launch.online, {"certify": "mean"}),
    "online share": (launch.online, {"certify": "none"}),
    "online bound": (launch.online, {"certify": "row", "bound": True}),
}


def run(name: str, x: Inputs, numbers: torch.Tensor, **more) -> launch.Output:
    function, options = FILTERS[name]
    return function(x.q, x.k, x.v, numbers.to(DEVICE), **x.options, **options, **more)


@FEWER
@given(
    drawn=layout_cases(head_dim=16),
    dtype=st.sampled_from(DTYPES),
    strides=st.sampled_from(LAYOUTS),
)
def test_arrange(drawn: tuple[Layout, Case], dtype: torch.dtype, strides: str) -> None:
    layout, case = drawn
    x = laid_out(on_device(case.make(dtype)), strides)
    got = arrange(x.k, x.mask, layout, variance_factor=0.5)
    new_v = x.v.new_empty(*x.v.shape[:2], layout.length, x.v.shape[3])
    in_order(x.v, got.tokens, new_v)
    y = on_cpu(x)
    places = ref.Places.of(layout, y.q.device)
    assert same_bits(got.k.cpu(), places.put(y.k))
    assert same_bits(new_v.cpu(), places.put(y.v))
    assert torch.equal(got.tokens.cpu().long(), token_order(layout))
    mask = places.put_mask(y.k, y.mask)
    if got.key_mask is None:
        assert mask.all()
    else:
        assert torch.equal(got.key_mask.cpu().expand_as(mask), mask)
    assert_centroids(got.centroids, places.put(y.k), mask, variance_factor=0.5)
    if strides == "bhsd" or not ON_GPU:  # a GPU reads, and so sums, others in another order
        moved = centroids(places.put(y.k).to(DEVICE), mask.to(DEVICE), variance_factor=0.5)
        assert same_bits(got.centroids.stats, moved.stats)


@LEAST
@given(drawn=CASES, dtype=st.sampled_from(DTYPES), name=st.sampled_from(sorted(FILTERS)))
def test_is_the_filter_of_permuted_tokens(
    drawn: tuple[Layout, Case], dtype: torch.dtype, name: str
) -> None:
    """Without text: bit for bit what one gets by permuting q, k, v and mask from outside."""
    layout, case = drawn
    layout, x, moved, order = permuted(layout, case.make(dtype))
    numbers = control(0.8)
    got = run(name, on_device(x), numbers, layout=layout)
    wanted = run(name, on_device(moved), numbers)
    assert got.out.transpose(1, 2).is_contiguous()
    assert same_bits(got.out.cpu()[:, :, order], wanted.out.cpu())
    assert same_bits(got.lse.cpu()[:, :, order], wanted.lse.cpu())
    assert same_bits(got.measures, wanted.measures)
    assert same_bits(got.histogram, wanted.histogram)
    assert torch.equal(got.count, wanted.count)
    if got.row_recall is not None:
        assert same_bits(got.row_recall.cpu()[:, :, order], wanted.row_recall.cpu())


@LEAST
@given(
    drawn=CASES,
    name=st.sampled_from(sorted(FILTERS)),
    strides=st.sampled_from(LAYOUTS),
    recall=st.sampled_from([0.1, 0.8, 1.0]),
)
def test_agrees_with_the_reference(
    drawn: tuple[Layout, Case], name: str, strides: str, recall: float
) -> None:
    layout, case = drawn
    assume(case.family not in ("integers", "constant"))  # ties, which either side may take
    x = laid_out(on_device(case.make(torch.float32)), strides)
    numbers = control(recall)
    got = run(name, x, numbers, layout=layout)
    function, options = FILTERS[name]
    y = on_cpu(x)
    oracle_of = ref.planned if function is launch.planned else ref.online
    wanted = oracle_of(y.q, y.k, y.v, numbers, **y.options, **options, layout=layout)
    counts = wanted.kept.sum(-1)
    text = layout.exact_tiles[0] if layout.exact_tiles else counts.shape[-1]
    assert torch.equal(got.count.cpu().long()[..., text:], counts[..., text:])
    if torch.equal(got.count.cpu().long(), counts):
        measures = [m[: c.MEASURE_ENGINE] for m in (got.measures.cpu(), wanted.measures)]
        torch.testing.assert_close(*measures, rtol=1e-3, atol=1e-3, equal_nan=True)
        slack = 1e-3 + 20 * float(oracle(y).rounding.max())
        torch.testing.assert_close(got.out.cpu(), wanted.out, rtol=1e-3, atol=slack)
    if recall == 1.0:
        dense = oracle(y)
        off = (got.out.cpu().double() - dense.out).abs()
        assert (off <= 1e-5 + 4 * dense.rounding[..., None] * y.v.abs().max()).all()


@LEAST
@given(drawn=CASES, name=st.sampled_from(sorted(FILTERS)), dtype=st.sampled_from(DTYPES))
def test_text_is_exact(drawn: tuple[Layout, Case], name: str, dtype: torch.dtype) -> None:
    """Text queries attend to every key, and every query to the text, at any recall."""
    layout, case = drawn
    assume(layout.has_exact)
    x = case.make(dtype)
    got = run(name, on_device(x), control(0.1), layout=layout)
    dense = oracle(x)
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[layout.before : layout.before + layout.grid_tokens] = False
    off = (got.out.cpu().double() - dense.out).abs()[:, :, text]
    eps = torch.finfo(dtype).eps
    allowed = (4 * dense.rounding[..., None] + 4 * eps) * x.v.double().abs().max() + 1e-5
    assert (off <= allowed[:, :, text]).all()
    found = achieved(got.lse.cpu(), dense)[:, :, text].nan_to_num(nan=1.0)
    assert ((found - 1).abs() <= 4 * dense.rounding[:, :, text] + 1e-5).all()


@LEAST
@given(drawn=CASES, name=st.sampled_from(["planned", "online"]))
def test_hidden_keys_never_matter(drawn: tuple[Layout, Case], name: str) -> None:
    layout, case = drawn
    x = case.make(torch.float16)
    assume(x.mask is not None)
    spoilt = x.spoil_hidden()
    got, wanted = (run(name, on_device(y), control(0.6), layout=layout) for y in (spoilt, x))
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.measures, wanted.measures)


def test_audit_sees_rows_where_they_are() -> None:
    layout = Layout(70, 3, 11, 13, 7)
    x = Case(batch=2, q_len=layout.tokens, kv_len=layout.tokens).make(torch.float32)
    got = run("planned", on_device(x), control(0.6), layout=layout, audited=True)
    found = achieved(got.lse.cpu(), oracle(x)).mean()
    assert got.measures[c.MEASURE_RECALL].item() == pytest.approx(float(found), abs=1e-4)
