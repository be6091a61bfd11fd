"""What holds for every filter of the reference, against float64 dense attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import (
    CERTIFIED,
    RECALLS,
    SEEDS,
    VARIANTS,
    Case,
    Inputs,
    achieved,
    assert_attention,
    by_element,
    cases,
    control,
    oracle,
    run,
    same_bits,
    visible_tiles,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref

variants = st.sampled_from(sorted(VARIANTS))
every_variant = pytest.mark.parametrize("variant", VARIANTS)
full = cases(q_len=st.sampled_from([1, 65, 200]), kv_len=st.sampled_from([64, 65, 257]))


class TestOutput:
    @given(case=cases(), recall=RECALLS, variant=variants)
    def test_is_attention_over_the_kept_tiles(
        self, case: Case, recall: float, variant: str
    ) -> None:
        x = case.make()
        result = run(variant, x, control(recall))
        assert_attention(result.out, result.lse, oracle(x, result.kept), x.v)
        assert not torch.any(result.kept & ~visible_tiles(x)[:, None, None])

    @given(case=cases(), recall=RECALLS, variant=variants)
    def test_float32_is_attention_over_the_kept_tiles(
        self, case: Case, recall: float, variant: str
    ) -> None:
        x = case.make(torch.float32)
        result = run(variant, x, control(recall))
        assert_attention(result.out, result.lse, oracle(x, result.kept), x.v)

    @given(case=cases(), variant=variants)
    def test_recall_1_keeps_every_tile(self, case: Case, variant: str) -> None:
        x = case.make()
        result = run(variant, x, control(1.0))
        seen = visible_tiles(x)[:, None, None].expand_as(result.kept)
        assert torch.equal(result.kept, seen)
        assert_attention(result.out, result.lse, oracle(x), x.v)
        assert result.measures[c.MEASURE_DENSITY] == 1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @given(case=cases(family=st.sampled_from(["gaussian", "spiky", "integers", "banded"])))
    def test_half_precision_is_no_worse_than_sdpa(self, dtype: torch.dtype, case: Case) -> None:
        x = case.make(dtype)
        wanted = oracle(x).out
        mask = None if x.mask is None else x.mask[:, None, None]
        dense = torch.nn.functional.scaled_dot_product_attention(
            x.q, x.k, x.v, mask, scale=x.scale, enable_gqa=True
        )
        # Both are rounded to the dtype at the end, so half a unit in the last place is free.
        unit = torch.finfo(dtype).eps / 2 * wanted.abs().amax()
        for filter_ in (ref.planned, ref.online):
            out = filter_(x.q, x.k, x.v, control(1.0), **x.options).out
            assert out.dtype == dtype
            error = (out.double() - wanted).abs().amax()
            assert error <= 2 * (dense.double() - wanted).abs().amax() + unit

    @given(case=cases(), recall=RECALLS, variant=variants)
    def test_error_is_bounded_by_the_lost_energy(
        self, case: Case, recall: float, variant: str
    ) -> None:
        x = case.make()
        result = run(variant, x, control(recall))
        dense = oracle(x)
        got = achieved(result.lse, dense).nan_to_num(nan=1.0)
        hidden = ~torch.ones_like(x.v[..., 0], dtype=torch.bool)
        if x.mask is not None:
            hidden = ~x.mask[:, None].expand_as(hidden)
        low = x.v.masked_fill(hidden[..., None], torch.inf).amin(2)
        high = x.v.masked_fill(hidden[..., None], -torch.inf).amax(2)
        spread = (high - low).clamp_min(0).repeat_interleave(case.group, 1)[:, :, None]
        slack = 2 * dense.rounding[..., None] * x.v.abs().amax()
        assert torch.all((result.out - dense.out).abs() <= (1 - got)[..., None] * spread + slack)

    @given(case=cases(), recall=RECALLS, variant=variants)
    def test_lies_in_the_hull_of_the_kept_values(
        self, case: Case, recall: float, variant: str
    ) -> None:
        x = case.make()
        result = run(variant, x, control(recall))
        slack = oracle(x).rounding[..., None] * x.v.abs().amax()
        taken = by_element(result.kept, case.q_len, case.kv_len)
        if x.mask is not None:
            taken = taken & x.mask[:, None, None]
        values = x.v.repeat_interleave(case.group, 1)
        for d in range(case.value_dim):
            channel = values[:, :, None, :, d].expand_as(taken)
            low = channel.masked_fill(~taken, torch.inf).amin(-1)
            high = channel.masked_fill(~taken, -torch.inf).amax(-1)
            some = taken.any(-1)
            out = result.out[..., d]
            assert torch.all(((out >= low - slack[..., 0]) & (out <= high + slack[..., 0]))[some])
            assert torch.all(out[~some] == 0)

    @given(case=cases(), recall=RECALLS, variant=variants)
    def test_values_of_one_give_one(self, case: Case, recall: float, variant: str) -> None:
        x = case.make()
        ones = x.replace(v=torch.ones_like(x.v))
        result = run(variant, ones, control(recall))
        some = (result.lse != -torch.inf)[..., None].expand_as(result.out)
        # Numerator and denominator are sums of the same weights, in whatever order.
        slack = 2 * (case.kv_len + 8) * torch.finfo(torch.float64).eps
        assert torch.all((result.out[some] - 1).abs() <= slack)
        assert torch.all(result.out[~some] == 0)

    @given(case=cases(kv_len=st.sampled_from([1, 65, 200])), recall=RECALLS, variant=variants)
    def test_identity_values_show_the_weights(
        self, case: Case, recall: float, variant: str
    ) -> None:
        x = case.make()
        eye = torch.eye(case.kv_len, dtype=torch.float64).expand(*x.k.shape[:2], -1, -1)
        result = run(variant, x.replace(v=eye), control(recall))
        weights, wanted = result.out, oracle(x, result.kept)
        assert torch.all(weights >= 0)
        sums = weights.sum(-1)
        some = result.lse != -torch.inf
        assert torch.all((sums[some] - 1).abs() <= wanted.rounding[some])
        outside = ~by_element(result.kept, case.q_len, case.kv_len)
        assert torch.all(weights[outside] == 0)
        exact = (wanted.scores - wanted.lse[..., None]).exp().nan_to_num(nan=0.0)
        assert torch.all((weights - exact).abs() <= wanted.rounding[..., None])


class TestShapes:
    @every_variant
    def test_no_key_gives_zero(self, variant: str) -> None:
        x = Case(kv_len=64, batch=2).make()
        x = x.replace(k=x.k[:, :, :0], v=x.v[:, :, :0])
        result = run(variant, x, control(0.5))
        assert result.out.shape == x.q.shape
        assert torch.all(result.out == 0)
        assert torch.all(result.lse == -torch.inf)
        assert result.kept.shape[-1] == 0
        assert result.measures[[c.MEASURE_DENSITY, c.MEASURE_ESTIMATE]].tolist() == [1, 1]

    @every_variant
    @pytest.mark.parametrize("kv_len", [0, 65])
    def test_no_query_gives_an_empty_tensor(self, variant: str, kv_len: int) -> None:
        x = Case(kv_len=65).make()
        x = x.replace(q=x.q[:, :, :0], k=x.k[:, :, :kv_len], v=x.v[:, :, :kv_len])
        result = run(variant, x, control(0.5))
        assert result.out.shape == (1, 1, 0, 8)
        assert result.lse.shape == (1, 1, 0)
        assert result.measures[[c.MEASURE_DENSITY, c.MEASURE_ESTIMATE]].tolist() == [1, 1]

    @every_variant
    def test_no_batch(self, variant: str) -> None:
        x = Case(mask="lengths").make()
        none = Inputs(x.q[:0], x.k[:0], x.v[:0], x.scale, x.mask[:0])
        assert run(variant, none, control(0.5)).out.shape == (0, 1, 200, 8)

    @every_variant
    @pytest.mark.parametrize("recall", [0.3, 1.0])
    def test_hidden_row_gives_zero_and_leaves_the_others(self, variant: str, recall: float) -> None:
        x = Case(batch=2, family="spiky", kv_len=577).make()
        mask = torch.ones(2, 577, dtype=torch.bool)
        mask[0] = False
        result = run(variant, x.replace(mask=mask), control(recall))
        assert torch.all(result.out[0] == 0)
        assert torch.all(result.lse[0] == -torch.inf)
        assert not result.kept[0].any()
        alone = run(variant, x.replace(q=x.q[1:], k=x.k[1:], v=x.v[1:]), control(recall))
        assert torch.equal(result.kept[1:], alone.kept)
        torch.testing.assert_close(result.out[1:], alone.out)
        assert torch.equal(result.measures.isnan(), alone.measures.isnan())
        torch.testing.assert_close(result.measures, alone.measures, equal_nan=True)

    @given(case=full, recall=RECALLS, variant=variants)
    def test_output_has_the_layout_of_the_op(self, case: Case, recall: float, variant: str) -> None:
        x = case.make(torch.float32)
        result = run(variant, x, control(recall))
        wanted = ref.new_output(x.q, x.v)
        assert result.out.stride() == wanted.stride()
        assert result.out.transpose(1, 2).is_contiguous()
        assert result.histogram.shape == (2, c.RANK_BINS)
        assert result.histogram.dtype == result.measures.dtype == torch.float32
        assert result.measures.shape == (c.MEASURE_SIZE,)
        assert result.kept.shape == (
            case.batch,
            case.heads,
            c.tiles(case.q_len, c.BLOCK_M),
            c.tiles(case.kv_len, c.BLOCK_N),
        )

    @given(case=cases(), recall=RECALLS, variant=variants)
    def test_density_counts_visible_tiles(self, case: Case, recall: float, variant: str) -> None:
        x = case.make()
        result = run(variant, x, control(recall))
        pairs = int(visible_tiles(x).sum()) * case.heads * result.kept.shape[2]
        density = int(result.kept.sum()) / pairs if pairs else 1.0
        assert float(result.measures[c.MEASURE_DENSITY]) == pytest.approx(density, rel=1e-6)


class TestInvariance:
    @given(case=cases(), recall=RECALLS, variant=variants, power=st.integers(-8, 8))
    def test_power_of_two_between_q_and_scale(
        self, case: Case, recall: float, variant: str, power: int
    ) -> None:
        x = case.make()
        a = run(variant, x, control(recall))
        moved = x.replace(q=x.q * 2.0**power, scale=x.scale * 2.0**-power)
        b = run(variant, moved, control(recall))
        assert torch.equal(a.kept, b.kept)
        assert same_bits(a.out, b.out)
        assert same_bits(a.lse, b.lse)
        assert same_bits(a.measures, b.measures)

    @given(case=cases(), recall=RECALLS, variant=variants, power=st.integers(-8, 8))
    def test_decisions_never_depend_on_the_values(
        self, case: Case, recall: float, variant: str, power: int
    ) -> None:
        x = case.make()
        a = run(variant, x, control(recall))
        b = run(variant, x.replace(v=x.v * 2.0**power), control(recall))
        assert torch.equal(a.kept, b.kept)
        assert same_bits(a.out * 2.0**power, b.out)
        assert same_bits(a.lse, b.lse)
        poisoned = run(variant, x.replace(v=torch.full_like(x.v, torch.nan)), control(recall))
        assert torch.equal(a.kept, poisoned.kept)
        assert same_bits(a.measures, poisoned.measures)

    @given(case=full, recall=RECALLS, variant=variants)
    @example(case=Case(q_len=1, mask="lengths"), recall=0.9, variant="planned")
    def test_hidden_keys_have_no_influence(self, case: Case, recall: float, variant: str) -> None:
        x = case.make()
        if x.mask is None:
            x = x.replace(mask=torch.arange(case.kv_len)[None] % 3 > 0)
        mask = x.mask.expand(case.batch, -1)[:, None, :, None]
        a = run(variant, x, control(recall))
        for poison in (torch.nan, torch.inf, 1e300):
            dirty = x.replace(k=torch.where(mask, x.k, poison), v=torch.where(mask, x.v, poison))
            b = run(variant, dirty, control(recall))
            assert torch.equal(a.kept, b.kept)
            assert same_bits(a.out, b.out)
            assert same_bits(a.lse, b.lse)
            assert same_bits(a.measures, b.measures)
            assert same_bits(a.histogram, b.histogram)

    @every_variant
    def test_order_of_batch_and_heads(self, variant: str) -> None:
        x = Case(batch=3, kv_heads=3, group=2, family="spiky", mask="lengths", seed=5).make()
        batch, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
        q = x.q.unflatten(1, (3, 2))[batch][:, heads].flatten(1, 2)
        moved = Inputs(q, x.k[batch][:, heads], x.v[batch][:, heads], x.scale, x.mask[batch])
        a, b = (run(variant, y, control(0.7)) for y in (x, moved))

        def move(tensor: Tensor) -> Tensor:
            return tensor.unflatten(1, (3, 2))[batch][:, heads].flatten(1, 2)

        assert not a.kept.all()
        assert torch.equal(move(a.kept), b.kept)
        assert same_bits(move(a.out), b.out)
        assert same_bits(move(a.lse), b.lse)

    @given(case=cases(group=2), recall=RECALLS, variant=variants)
    def test_grouped_queries_equal_repeated_heads(
        self, case: Case, recall: float, variant: str
    ) -> None:
        x = case.make()
        a = run(variant, x, control(recall))
        repeated = x.replace(k=x.k.repeat_interleave(2, 1), v=x.v.repeat_interleave(2, 1))
        b = run(variant, repeated, control(recall))
        assert torch.equal(a.kept, b.kept)
        assert same_bits(a.out, b.out)
        assert same_bits(a.lse, b.lse)
        assert same_bits(a.measures, b.measures)

    @given(case=cases(), recall=RECALLS, variant=variants)
    def test_runs_repeat_bitwise(self, case: Case, recall: float, variant: str) -> None:
        x = case.make(torch.float32)
        a, b = (run(variant, x, control(recall)) for _ in range(2))
        for name in ("out", "lse", "kept", "histogram", "measures"):
            assert same_bits(getattr(a, name), getattr(b, name)), name

    @every_variant
    def test_query_tile_alone_equals_the_same_in_a_batch(self, variant: str) -> None:
        # With a threshold of its own a node's tiles share a budget, so the threshold is given.
        x = Case(batch=2, kv_heads=2, q_len=129, kv_len=577, family="spiky", seed=1).make()
        numbers = control(0.9, threshold=None if "top" in variant else 0.05)
        together = run(variant, x, numbers)
        for b in range(2):
            for h in range(2):
                one = Inputs(*(t[b : b + 1, h : h + 1] for t in (x.q, x.k, x.v)), x.scale, x.mask)
                alone = run(variant, one, numbers)
                assert torch.equal(alone.kept[0, 0], together.kept[b, h])
                wanted = oracle(one, alone.kept)
                assert_attention(together.out[b : b + 1, h : h + 1], alone.lse, wanted, x.v)


def _strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _offset(x: Tensor) -> Tensor:
    room = torch.full((x.shape[0] + 1, *x.shape[1:]), torch.nan, dtype=x.dtype).flatten()
    room = torch.cat((room, room.new_full((3,), torch.nan)))
    return room[3 : 3 + x.numel()].view(x.shape).copy_(x)


def _heads_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _padded(x: Tensor) -> Tensor:
    room = torch.full((*x.shape[:2], x.shape[2] + 7, x.shape[3] + 5), torch.nan, dtype=x.dtype)
    room[:, :, 3:-4, 2:-3] = x
    return room[:, :, 3:-4, 2:-3]


LAYOUTS = {"strided": _strided, "offset": _offset, "heads_last": _heads_last, "padded": _padded}


class TestLayouts:
    @every_variant
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides_do_not_matter(self, variant: str, layout: str, dtype: torch.dtype) -> None:
        x = Case(batch=2, kv_heads=2, group=2, head_dim=40, family="spiky", seed=3).make(dtype)
        moved = x.replace(**{name: LAYOUTS[layout](getattr(x, name)) for name in "qkv"})
        copies = [getattr(moved, name).clone() for name in "qkv"]
        a, b = (run(variant, y, control(0.8)) for y in (x, moved))
        assert not a.kept.all()
        assert torch.equal(a.kept, b.kept)
        assert same_bits(a.out, b.out)
        assert same_bits(a.lse, b.lse)
        for name, copy in zip("qkv", copies, strict=True):
            assert torch.equal(getattr(moved, name), copy), f"{name} was written to"

    @every_variant
    def test_expanded_batch(self, variant: str) -> None:
        x = Case(kv_heads=2, family="banded", kv_len=577, seed=4).make()
        q = x.q.expand(2, -1, -1, -1)
        mask = torch.ones(1, 577, dtype=torch.bool)
        mask[0, 400:] = False
        k, v = (t.expand(2, -1, -1, -1) for t in (x.k, x.v))
        expanded = Inputs(q, k, v, x.scale, mask.expand(2, -1))
        real = Inputs(q.clone(), k.clone(), v.clone(), x.scale, mask.repeat(2, 1))
        a, b = (run(variant, y, control(0.8)) for y in (expanded, real))
        assert torch.equal(a.kept, b.kept)
        assert same_bits(a.out, b.out)


class TestExtremes:
    @every_variant
    @pytest.mark.parametrize("recall", [0.5, 1.0])
    def test_all_scores_minus_infinity_give_zero(self, variant: str, recall: float) -> None:
        x = Case(kv_len=257, q_len=129, seed=2).make()
        x.q[..., 0] = 1.0
        x.k[..., 0] = -torch.inf
        mine = run(variant, x, control(recall)).out
        dense = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, scale=x.scale)
        assert torch.all(dense == 0)
        assert torch.all(mine == 0)

    @given(case=cases(), recall=RECALLS, variant=variants, seed=SEEDS)
    def test_one_dominant_key(self, case: Case, recall: float, variant: str, seed: int) -> None:
        x = case.make()
        where = seed % case.kv_len
        k = x.k.clone()
        k[:, :, where] = 1e4 * x.q[:, :: case.group].mean(2)
        dominant = x.replace(k=k)
        result = run(variant, dominant, control(recall))
        assert_attention(result.out, result.lse, oracle(dominant, result.kept), x.v)
        assert torch.isfinite(result.out).all()

    @pytest.mark.parametrize("variant", ["planned", *CERTIFIED, "online share", "online lse"])
    @pytest.mark.parametrize("size", [1e4, 1e18])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_huge_scores(self, variant: str, size: float, dtype: torch.dtype) -> None:
        x = Case(kv_len=257, q_len=129, seed=2).make(dtype)
        x = x.replace(q=x.q * size)
        result = run(variant, x, control(0.9))
        assert torch.isfinite(result.out).all()
        assert torch.isfinite(result.lse).all()
        # One key has it all, and at recall 1 it is the one that dense attention finds.
        every = run(variant, x, control(1.0))
        scores = (x.scale * (x.q @ x.k.mT)).double()
        clear = scores.topk(2, -1).values.diff(dim=-1)[..., 0] < -1e-5 * scores.abs().amax()
        best = x.v[0, 0, scores[0, 0].argmax(-1)]
        assert clear.sum() > 100
        torch.testing.assert_close(every.out[0, 0][clear[0, 0]], best[clear[0, 0]])

    @every_variant
    @pytest.mark.parametrize("recall", [0.5, 1.0])
    def test_minus_infinity_takes_a_key_away(self, variant: str, recall: float) -> None:
        x = Case(kv_len=257, q_len=129, seed=2, family="spiky").make()
        x.q[..., 0] = x.q[..., 0].abs() + 1e-3
        gone = torch.arange(257) % 3 == 0
        gone[64:128] = True  # a whole tile
        x.k[:, :, gone, 0] = -torch.inf
        result = run(variant, x, control(recall))
        mask = (~gone)[None]
        wanted = oracle(x.replace(k=x.k.masked_fill(~x.k.isfinite(), 0), mask=mask), result.kept)
        assert_attention(result.out, result.lse, wanted, x.v)
        assert torch.isfinite(result.out).all()

    @every_variant
    @pytest.mark.parametrize("recall", [0.5, 1.0])
    def test_plus_infinity_is_nan_where_sdpa_is(self, variant: str, recall: float) -> None:
        x = Case(kv_len=257, q_len=129, seed=2).make()
        x.q[..., 0] = -1.0
        x.q[0, 0, 5, 0] = 1.0
        x.k[0, 0, 70, 0] = torch.inf
        result = run(variant, x, control(recall))
        row = torch.zeros(129, dtype=torch.bool)
        row[5] = True
        assert torch.equal(result.out.isnan().any(-1)[0, 0], row)
        hidden = torch.arange(257)[None] != 70
        wanted = oracle(x.replace(mask=hidden), result.kept)
        error = (result.out - wanted.out).abs()[0, 0, ~row]
        assert torch.all(error <= (x.v.abs().amax() * wanted.rounding[0, 0, ~row])[:, None])

    @every_variant
    @pytest.mark.parametrize("recall", [0.5, 1.0])
    @pytest.mark.parametrize("row", [6, 7, 128])
    def test_nan_query_spoils_its_row_alone(self, variant: str, recall: float, row: int) -> None:
        x = Case(batch=2, kv_len=257, q_len=129, seed=2, family="spiky").make()
        clean = run(variant, x, control(recall))
        q = x.q.clone()
        q[1, 0, row, 3] = torch.nan
        result = run(variant, x.replace(q=q), control(recall))
        spoilt = torch.zeros(2, 1, 129, dtype=torch.bool)
        spoilt[1, 0, row] = True
        assert torch.equal(result.out.isnan().all(-1), spoilt)
        assert torch.equal(result.out.isnan().any(-1), spoilt)
        assert torch.equal(result.lse.isnan(), spoilt)
        wanted = oracle(x, result.kept)
        error = (result.out - wanted.out).abs()[~spoilt]
        assert torch.all(error <= x.v.abs().amax() * wanted.rounding[~spoilt][:, None])
        if recall == 1:
            assert same_bits(result.out[~spoilt], clean.out[~spoilt])

    @every_variant
    @pytest.mark.parametrize("recall", [0.5, 1.0])
    def test_nan_key_spoils_its_head_alone(self, variant: str, recall: float) -> None:
        x = Case(kv_heads=3, group=2, kv_len=257, q_len=129, seed=2, family="spiky").make()
        k = x.k.clone()
        k[0, 1, 100, 3] = torch.nan
        result = run(variant, x.replace(k=k), control(recall))
        spoilt = torch.tensor([False, False, True, True, False, False])
        dense = torch.nn.functional.scaled_dot_product_attention(
            x.q, k, x.v, scale=x.scale, enable_gqa=True
        )
        assert torch.equal(dense.isnan().all(-1).all(-1)[0], spoilt)
        assert result.out[0, spoilt].isnan().all()
        wanted = oracle(x, result.kept)
        error = (result.out - wanted.out).abs()[0, ~spoilt]
        assert torch.all(error <= x.v.abs().amax() * wanted.rounding[0, ~spoilt][..., None])


class Biggest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                # An expanded view takes no memory, so the storage is what counts.
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, min(tensor.numel(), stored))
        return out


class TestWork:
    @every_variant
    def test_no_tensor_of_q_len_by_kv_len(self, variant: str) -> None:
        length = 4096
        x = Case(q_len=length, kv_len=length, family="spiky").make(torch.float32)
        with Biggest() as biggest:
            run(variant, x, control(0.95))
            if variant.startswith("planned"):
                run(variant, x, control(1.0), audited=True)
        # One query tile against all keys, or all query tiles against one key tile.
        assert length * 8 <= biggest.numel <= length * c.BLOCK_M

    @every_variant
    def test_values_of_dropped_tiles_are_not_read(self, variant: str) -> None:
        x = Case(kv_heads=2, q_len=129, kv_len=577, family="spiky", seed=8).make()
        result = run(variant, x, control(0.6))
        dropped = ~result.kept
        assert dropped.any()
        for h in range(2):
            for t, rows in enumerate((slice(0, 128), slice(128, 129))):
                where = by_element(dropped[0, h, t : t + 1], 1, 577)[0]
                v = x.v.clone()
                v[0, h, where] = torch.nan
                again = run(variant, x.replace(v=v), control(0.6))
                assert torch.equal(again.kept, result.kept)
                assert same_bits(again.out[0, h, rows], result.out[0, h, rows])
