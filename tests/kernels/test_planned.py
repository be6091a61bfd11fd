"""The planned filter's kernels against the reference and against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    FEWER,
    KERNEL_CASES,
    LAYOUTS,
    MARKS,
    assert_audit,
    assert_centroids,
    assert_output,
    assert_plan,
    laid_out,
    listed,
    on_cpu,
    on_device,
)
from support import Case, Inputs, control, same_bits, visible_tiles

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels import reference as ref
from cef_compile.kernels.centroids import centroids
from cef_compile.kernels.judged import judged_lists
from cef_compile.kernels.lists import lists
from cef_compile.kernels.plan import plan
from cef_compile.kernels.ranks import variance_factor
from cef_compile.kernels.schedule import Lists, heads_together
from cef_compile.kernels.tuning import find_tuning

pytestmark = MARKS

CONTROLS = st.one_of(
    st.builds(control, st.sampled_from([0.3, 0.7, 0.9, 0.99, 1.0])),
    st.builds(control, log2=st.sampled_from([-12.0, -3.0, -1.5, 0.0])),
)


def planned(x: Inputs, numbers: torch.Tensor, **options) -> launch.Output:
    """By the Triton kernel; ``test_engines.py`` has the others."""
    options = {"engine": "triton"} | options | x.options
    return launch.planned(x.q, x.k, x.v, numbers.to(DEVICE), **options)


def kernel_plan(x: Inputs, **tuning):
    """Bins, energy and histogram of the kernels, for inputs on the device."""
    known = centroids(x.k, x.mask, variance_factor=variance_factor(x.scale))
    shape = {"group_tiles": 1, "block_keys": 64, "warps": 4, "stages": 1} | tuning
    return plan(x.q, known.stats, known.count, scale=x.scale, keep_energy=True, **shape), known


@FEWER
@given(case=KERNEL_CASES, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_centroids(case: Case, dtype: torch.dtype, layout: str) -> None:
    x = laid_out(on_device(case.make(dtype)), layout)
    known = centroids(x.k, x.mask, variance_factor=0.5)
    y = on_cpu(x)
    assert_centroids(known, y.k, y.mask, variance_factor=0.5)


@FEWER
@given(
    case=KERNEL_CASES,
    dtype=st.sampled_from(DTYPES),
    group_tiles=st.sampled_from([1, 2]),
    block_keys=st.sampled_from([64, 128]),
)
def test_plan(case: Case, dtype: torch.dtype, group_tiles: int, block_keys: int) -> None:
    """Bins are the reference's within the tie margin; the histogram is that of the bins."""
    x = case.make(dtype)
    ranked, _ = kernel_plan(on_device(x), group_tiles=group_tiles, block_keys=block_keys)
    assert_plan(x, ranked)


@given(
    key_heads=st.integers(1, 40),
    group=st.integers(1, 4),
    length=st.integers(0, 200_000),
    dim=st.sampled_from([8, 64, 128, 256]),
)
def test_heads_together_share_the_cache(key_heads: int, group: int, length: int, dim: int) -> None:
    """Whole groups of heads that share keys: one at least, and no more than fit."""
    k = torch.empty(1, key_heads, length, dim, dtype=torch.bfloat16, device="meta")
    together = heads_together(key_heads * group, k, k)
    bytes_of_one = 2 * length * dim * k.element_size()
    assert together % group == 0
    assert together >= group
    assert together == group or together // group * bytes_of_one <= 24 << 20
    assert (together // group + 1) * bytes_of_one > 24 << 20 or not length


@FEWER
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 5),
    n_m=st.sampled_from([1, 3, 40]),
    together=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_order(batch: int, heads: int, n_m: int, together: int, seed: int) -> None:
    """Every query tile once; some heads at a time, and of these the longest list first."""
    draw = torch.Generator().manual_seed(seed)
    bins = torch.randint(0, 2, (batch, heads, n_m, 9), generator=draw, dtype=torch.uint8) * 255
    histogram = torch.ones(2, c.RANK_BINS, dtype=torch.int64)
    given = (bins, torch.full((1, 9), c.BLOCK_N, dtype=torch.int32), histogram, control(0.0))
    bins, count, histogram, numbers = (t.to(DEVICE) for t in given)
    found, _, _ = lists(
        bins, None, count, histogram, numbers,
        rule="threshold", partial=False, want_kept=False, together=together,
    )  # fmt: skip
    assert_longest_first(found, (bins != 0).sum(-1), together)


def assert_longest_first(found: Lists, kept: torch.Tensor, together: int) -> None:
    """Counts and order; ``kept`` is what counts should be ``[B, H, Tm]``."""
    n_m = kept.shape[2]
    counts, order = found.count[0].flatten().cpu(), found.order.cpu().long()
    assert torch.equal(counts, kept.flatten().int().cpu())
    for first in range(0, len(order), together * n_m):
        span = order[first : first + together * n_m]
        assert torch.equal(span.sort().values, first + torch.arange(len(span)))
        wanted = counts[first : first + len(span)].sort(descending=True).values
        assert torch.equal(counts[span], wanted)
    assert not found.queue.any()


@FEWER
@given(
    shape=st.tuples(
        st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 3]),
        st.sampled_from([1, 9, 1024, 1500]),
    ),
    partial=st.booleans(),
    together=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_lists_of_what_was_judged(
    shape: tuple[int, int, int, int], partial: bool, together: int, seed: int
) -> None:
    """Wholly visible tiles ascending, then partly visible ones ascending; dropped ones nowhere."""
    draw = torch.Generator().manual_seed(seed)
    judged = torch.randint(0, 3 if partial else 2, shape, generator=draw, dtype=torch.uint8)
    if not partial:
        judged *= c.JUDGED_WHOLE
    found = judged_lists(judged.to(DEVICE), partial=partial, together=together)
    assert_longest_first(found, (judged != 0).sum(-1), together)
    whole = judged == c.JUDGED_WHOLE
    assert torch.equal(found.count[1].cpu(), whole.sum(-1).int())
    rows = zip(judged.flatten(0, 2), found.index.flatten(0, 2).cpu(), strict=True)
    for row, index in rows:
        wanted = [(row == state).nonzero()[:, 0] for state in (c.JUDGED_WHOLE, c.JUDGED_PARTLY)]
        wanted = torch.cat(wanted)
        assert torch.equal(index[: len(wanted)].long(), wanted)


@FEWER
@given(
    case=KERNEL_CASES,
    numbers=CONTROLS,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    rule=st.sampled_from(c.PLANNED_RULES),
    compensate=st.booleans(),
)
def test_planned(
    case: Case,
    numbers: torch.Tensor,
    dtype: torch.dtype,
    layout: str,
    rule: str,
    compensate: bool,
) -> None:
    x = laid_out(on_device(case.make(dtype)), layout)
    got = planned(x, numbers, rule=rule, compensate=compensate)
    ranked, _ = kernel_plan(x)
    x = on_cpu(x)
    seen = visible_tiles(x)
    shape = (*got.count.shape, seen.shape[1])
    kept = listed(got.index, got.count, seen.shape[1])
    assert not (kept & ~seen[:, None, None]).any()
    assert kept.any(-1).equal(seen.any(-1)[:, None, None].expand(shape[:3]))

    # The lists are the ones that the reference's rule takes from the same bins and energies.
    bins, energy = ranked.bins.cpu(), ranked.energy.cpu()
    mine = ref.Plan(bins, energy, seen)
    histogram = ranked.histogram.double().cpu()
    totals = histogram.sum(-1, keepdim=True).clamp_min(1)
    wanted, log2_threshold = ref.choose(mine, histogram / totals, numbers.double(), rule)
    if rule == "top_p":  # fp32 sums of energy: a tile at the very edge may go either way
        assert (kept.sum(-1) - wanted.sum(-1)).abs().max() <= 1
    else:
        assert kept.equal(wanted)

    measures = got.measures.cpu()
    pairs = seen.sum() * shape[1] * shape[2]
    density = kept.sum() / pairs if pairs else 1.0
    assert measures[c.MEASURE_DENSITY] == pytest.approx(float(density), rel=1e-6)
    total = energy.double().sum()
    estimate = (energy.double() * kept).sum() / total if total else 1.0
    assert measures[c.MEASURE_ESTIMATE] == pytest.approx(float(estimate), abs=2e-5)
    applied = float(log2_threshold)
    assert measures[c.MEASURE_LOG2_THRESHOLD].item() == pytest.approx(applied, nan_ok=True)
    assert measures[[c.MEASURE_RECALL, c.MEASURE_ERROR]].isnan().all()
    torch.testing.assert_close(
        got.histogram.cpu().double(), histogram / totals, rtol=1e-6, atol=1e-9
    )

    assert_output(x, kept, got, compensate)


@FEWER
@given(case=KERNEL_CASES, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_strides_do_not_matter(case: Case, dtype: torch.dtype, layout: str) -> None:
    x = laid_out(on_device(case.make(dtype)), layout)
    numbers = control(0.8)
    got = planned(x, numbers)
    wanted = planned(laid_out(x, "bhsd"), numbers)
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.lse, wanted.lse)
    assert same_bits(got.measures, wanted.measures)


@FEWER
@given(case=KERNEL_CASES, dtype=st.sampled_from(DTYPES))
def test_hidden_keys_never_matter(case: Case, dtype: torch.dtype) -> None:
    x = on_device(case.make(dtype))
    if x.mask is None:
        return
    numbers = control(0.8)
    spoilt = x.spoil_hidden()
    got, wanted = planned(spoilt, numbers), planned(x, numbers)
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.lse, wanted.lse)
    assert same_bits(got.histogram, wanted.histogram)


@FEWER
@given(case=KERNEL_CASES, dtype=st.sampled_from(DTYPES), data=st.data())
def test_nan_rows_keep_everything(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    """A NaN query makes its own row NaN and no other; its query tile drops nothing."""
    x = case.make(dtype)
    row = data.draw(st.integers(0, case.q_len // c.PLAN_ROW_STRIDE - 1 if case.q_len > 1 else 0))
    row *= c.PLAN_ROW_STRIDE
    x.q[0, 0, row] = torch.nan
    x = on_device(x)
    got = planned(x, control(0.5))
    out = got.out.cpu()
    seen = visible_tiles(on_cpu(x))[0]
    assert got.count[0, 0, row // c.BLOCK_M] == seen.sum()
    spoilt = torch.zeros(out.shape[:3], dtype=torch.bool)
    spoilt[0, 0, row] = bool(seen.any())
    assert out.isnan().any(-1).equal(spoilt)


def test_batch_and_heads_are_independent() -> None:
    """A head alone equals the head in a batch, bitwise, at one threshold."""
    case = Case(batch=2, kv_heads=2, group=2, q_len=200, kv_len=257, head_dim=16, seed=3)
    x = on_device(case.make(torch.float16))
    numbers = control(log2=-2.5)
    got = planned(x, numbers)
    for b in range(2):
        for h in range(4):
            one = x.replace(
                q=x.q[b : b + 1, h : h + 1],
                k=x.k[b : b + 1, h // 2 : h // 2 + 1],
                v=x.v[b : b + 1, h // 2 : h // 2 + 1],
            )
            alone = planned(one, numbers)
            assert same_bits(alone.out[0, 0], got.out[b, h])
            assert same_bits(alone.lse[0, 0], got.lse[b, h])


@FEWER
@given(case=KERNEL_CASES, dtype=st.sampled_from(DTYPES), power=st.integers(-3, 3))
def test_scaling(case: Case, dtype: torch.dtype, power: int) -> None:
    """v times 2^a gives out times 2^a, bitwise."""
    x = on_device(case.make(dtype))
    numbers = control(0.7)
    got, scaled = planned(x, numbers), planned(x.replace(v=x.v * 2.0**power), numbers)
    if dtype != torch.float16:  # whose small numbers lose bits
        assert same_bits(scaled.out, got.out * 2.0**power)
    assert same_bits(scaled.lse, got.lse)


@FEWER
@given(case=KERNEL_CASES, dtype=st.sampled_from(DTYPES))
def test_full_recall_is_dense(case: Case, dtype: torch.dtype) -> None:
    x = on_device(case.make(dtype))
    got = planned(x, control(1.0))
    y = on_cpu(x)
    seen = visible_tiles(y)[:, None, None]
    kept = seen.expand(*got.count.shape, seen.shape[-1])
    assert got.count.cpu().long().equal(kept.sum(-1))
    assert_output(y, kept, got, compensate=False)


@FEWER
@given(
    case=KERNEL_CASES,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    compensate=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_audit(case: Case, dtype: torch.dtype, layout: str, compensate: bool, seed: int) -> None:
    x = laid_out(on_device(case.make(dtype)), layout)
    got = planned(x, control(0.6, seed=seed), audited=True, compensate=compensate)
    assert_audit(got, on_cpu(x), seed)


def test_audit_samples_as_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """More query tiles than an audit looks at: both look at the same ones."""
    monkeypatch.setattr(c, "AUDIT_SMALL_PAIRS", 64)
    case = Case(batch=2, kv_heads=35, q_len=1, kv_len=65, head_dim=8, seed=5)
    assert 1 < c.audit_samples(70, 2) < 70
    seed = 12345
    x = case.make(torch.float32)
    got = planned(on_device(x), control(0.4, seed=seed), audited=True)
    wanted = assert_audit(got, x, seed)
    assert wanted.stderr > 0
    assert wanted.error_stderr > 0


def test_audit_splits_the_keys() -> None:
    """Few samples with many keys: their parts are put together."""
    x = Case(batch=1, q_len=129, kv_len=2100, head_dim=16, family="spiky", seed=2).make(
        torch.float16
    )
    got = planned(on_device(x), control(0.5), audited=True)
    assert assert_audit(got, x, 0).error > 0.01


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 65), (65, 0), (0, 0)])
@pytest.mark.parametrize("rule", c.PLANNED_RULES)
def test_empty(q_len: int, kv_len: int, rule: str) -> None:
    x = on_device(Case(batch=2, q_len=q_len, kv_len=kv_len).make(torch.float16))
    got = planned(x, control(0.5), rule=rule, compensate=True, audited=True)
    assert got.out.shape == (2, 1, q_len, 8)
    assert not got.out.any()
    assert (got.lse == -torch.inf).all()
    wanted = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert got.measures[: c.MEASURE_LOG2_THRESHOLD].cpu().equal(wanted)
    assert got.measures[c.MEASURE_ERROR : c.MEASURE_ENGINE].tolist() == [0.0, 0.0, 0.0]


def test_inputs_stay_as_they_were() -> None:
    x = on_device(Case(mask="random").make(torch.float16))
    before = [t.clone() for t in (x.q, x.k, x.v, x.mask)]
    planned(x, control(0.5), compensate=True, audited=True)
    assert all(map(torch.equal, before, (x.q, x.k, x.v, x.mask)))


def test_every_size_has_a_configuration() -> None:
    for architecture in (0, 80, 89, 90, 100):
        for wide in (False, True):
            for dim in range(8, c.LIMITS["cuda"].max_head_dim + 1, 8):
                entry = find_tuning(architecture, dim, wide=wide)
                assert (entry is None) == (wide and dim > c.FP32_MAX_HEAD_DIM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 1, 257, 16)}, "do not fit"),
        ({"q": torch.zeros(1, 1, 200, 12), "k": torch.zeros(1, 1, 257, 12)}, "head_dim"),
        ({"v": torch.zeros(1, 1, 257, 264)}, "head_dim"),
        ({"q": torch.zeros(1, 200, 8)}, "4 dimensions"),
        ({"v": torch.zeros(1, 1, 257, 8, dtype=torch.float16)}, "one dtype"),
        ({"scale": -1.0}, "scale"),
        ({"mask": torch.ones(1, 256, dtype=torch.bool)}, "key_mask"),
        ({"mask": torch.ones(1, 257)}, "key_mask"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    x = on_device(Case().make(torch.float32).replace(**change))
    with pytest.raises(ValueError, match=message):
        planned(x, control())


def test_refuses_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="rule must be one of"):
        planned(on_device(Case().make(torch.float32)), control(), rule="best")
