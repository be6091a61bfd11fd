"""Scores of queries and keys in 8 bits: the rounding, its emulation, the engine that has them."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    FEWER,
    LAYOUTS,
    MARKS,
    assert_nan_row_keeps_to_itself,
    assert_replays,
    assert_same_bits,
    attend_on_threads,
    drawn_tiles,
    laid_out,
    listed,
    on_cpu,
    on_device,
    spoilt,
)
from order_cases import layout_cases, permuted
from support import Case, Inputs, cases, control, same_bits, visible_tiles
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels import reference as ref
from cef_compile.kernels.centroids import arrange, centroids
from cef_compile.kernels.eight_bits import EightBits, eight_bits
from cef_compile.kernels.order import Layout
from cef_compile.kernels.ranks import variance_factor

CASES = cases(
    q_len=st.sampled_from([1, 65, 129, 300]),
    kv_len=st.sampled_from([1, 64, 65, 200, 257, 700]),
    head_dim=st.sampled_from([16, 128]),
)
EPS = torch.finfo(torch.float32).eps


def of_kernels(x: Inputs) -> EightBits:
    """By the kernels, for inputs on the device."""
    known = centroids(x.k, x.mask, variance_factor=variance_factor(x.scale))
    return eight_bits(x.q, x.k, known.stats, known.count, scale=x.scale, key_mask=x.mask)


def of_reference(found: EightBits) -> ref.EightBits:
    """What kernels found, on the CPU."""
    return ref.EightBits(**{f.name: getattr(found, f.name).cpu() for f in fields(found)})


def assert_scores(x: Inputs, eight: ref.EightBits) -> None:
    """Each number is within half a unit, and so a score within what that makes of it."""
    group = x.q.shape[1] // x.k.shape[1]
    q, k = x.q.double(), x.k.double().repeat_interleave(group, 1)
    row_scale = eight.row_scale.double()[..., None]
    key_scale = eight.key_scale.double().repeat_interleave(group, 1)
    key_scale = key_scale.repeat_interleave(c.BLOCK_N, -1)[..., None, : k.shape[2]]
    rows, keys = eight.q.double(), eight.k.double().repeat_interleave(group, 1)
    got = x.scale * row_scale * key_scale * (rows @ keys.mT) + eight.row_shift.double()[..., None]
    # q . k' - r.q8 . s.k8 = q . (k' - s.k8) + (q - r.q8) . s.k8, with r and s the units.
    slack = q.abs().sum(-1, keepdim=True) * key_scale / 2
    slack = slack + row_scale * key_scale * keys.abs().sum(-1)[..., None, :] / 2
    largest = q.abs().amax(-1, keepdim=True) * k.nan_to_num(nan=0.0).abs().max()
    sums = EPS * (2 * q.shape[3] + k.shape[2]) * q.shape[3] * largest
    off = (got - x.scale * (q @ k.mT)).abs()
    if x.mask is not None:
        off = off.masked_fill(~x.mask[:, None, None], 0)
    assert (off <= x.scale * ((1 + 1e-5) * slack + sums) + 1e-12).all()


@FEWER
@given(case=CASES)
def test_reference(case: Case) -> None:
    """In float64; the mean that keys lose is in the shift."""
    x = case.make()
    eight = ref.eight_bits(x.q, x.k, x.scale, x.mask)
    assert eight.q.dtype == eight.k.dtype == torch.int8
    assert_scores(x, eight)
    if x.mask is not None:
        assert not eight.k.masked_fill(x.mask[:, None, :, None], 0).any()


@FEWER
@given(case=CASES)
def test_attention_of_the_reference(case: Case) -> None:
    """A score that is off by d changes a weight by a factor of at most exp(2 d)."""
    x = case.make()
    eight = ref.eight_bits(x.q, x.k, x.scale, x.mask)
    n_m, n_n = c.tiles(case.q_len, c.BLOCK_M), c.tiles(case.kv_len, c.BLOCK_N)
    kept = torch.ones(case.batch, case.heads, n_m, n_n, dtype=torch.bool)
    got, lse = ref.attend_eight_bits(eight, x.v, kept, x.scale, x.mask)
    wanted, exact = ref.attend(x.q, x.k, x.v, kept, x.scale, x.mask)
    seen = torch.where(torch.ones_like(x.k, dtype=torch.bool), x.k, 0)
    # |q - r.q8|, |k' - s.k8| and |k8| in units: 1/2, 1/2 and 127.
    unit = eight.key_scale.amax() / 2
    off = x.q.abs().sum(-1) * unit + eight.row_scale / 2 * (254 * unit * seen.shape[3])
    off = x.scale * off * (1 + 1e-9) + 1e-9 * exact.abs().nan_to_num(posinf=0.0)
    assert (lse == -torch.inf).equal(exact == -torch.inf)
    assert ((lse - exact).nan_to_num(nan=0.0).abs() <= off).all()
    largest = x.v.abs().amax()
    assert ((got - wanted).abs() <= largest * (2 * off).expm1()[..., None] + 1e-9).all()


class TestKernels:
    pytestmark = MARKS

    @FEWER
    @given(case=CASES, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
    def test_rounding(self, case: Case, dtype: torch.dtype, layout: str) -> None:
        x = laid_out(on_device(case.make(dtype)), layout)
        found = of_kernels(x)
        assert found.q.is_contiguous()
        assert found.k.is_contiguous()
        eight, y = of_reference(found), on_cpu(x)
        assert_scores(y, eight)
        # Queries lose nothing, so that their units are the reference's, and numbers up to ties.
        wanted = ref.eight_bits(y.q.double(), y.k.double(), y.scale, y.mask)
        torch.testing.assert_close(eight.row_scale.double(), wanted.row_scale, rtol=1e-6, atol=0)
        assert (eight.q.int() - wanted.q.int()).abs().max() <= 1

    @FEWER
    @given(case=CASES)
    def test_hidden_keys_never_matter(self, case: Case) -> None:
        x = on_device(case.make(torch.float16))
        assume(x.mask is not None)
        hidden = ~x.mask[:, None, :, None]
        found, wanted = of_kernels(x.replace(k=x.k.masked_fill(hidden, torch.nan))), of_kernels(x)
        for f in fields(found):
            assert same_bits(getattr(found, f.name), getattr(wanted, f.name))
        assert not found.k.masked_fill(~hidden, 0).any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_is_nan(self, bad: float) -> None:
        """A row spoils itself; a key spoils the mean, and so every tile of its head."""
        case = Case(2, kv_heads=2, q_len=130, kv_len=200, head_dim=16)
        x = on_device(case.make(torch.float16))
        x.q[1, 0, 7, 3] = bad
        found = of_kernels(x).row_scale.isnan()
        assert found.sum() == 1
        assert found[1, 0, 7]
        x.k[0, 1, 70, 2] = bad
        found = of_kernels(x).key_scale.isnan()
        assert found.flatten(0, 1).all(-1).tolist() == [False, True, False, False]
        assert found.sum() == found.shape[-1]


ON_HOPPER = cases(
    q_len=st.sampled_from([1, 65, 128, 129, 300]),
    kv_len=st.sampled_from([1, 64, 65, 128, 200, 257, 700]),
    head_dim=st.just(128),
    value_dim=st.sampled_from([128, 72]),
)
ORDERED = layout_cases(head_dim=128, value_dim=128)
HALVES = st.sampled_from([torch.bfloat16, torch.float16])
CONTROLS = st.one_of(
    st.builds(control, st.sampled_from([0.3, 0.7, 0.9, 1.0])),
    st.builds(control, log2=st.sampled_from([-12.0, -3.0, 0.0])),
)


def planned(x: Inputs, numbers: Tensor, engine: str | None, **options) -> launch.Output:
    options = {"scores": "int8", "engine": engine} | x.options | options
    return launch.planned(x.q, x.k, x.v, numbers.to(DEVICE), **options)


def assert_attention(
    x: Inputs, eight: ref.EightBits, kept: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Float64 attention to what the integers stand for, up to counted roundings.

    Args:
        x: inputs on the CPU, in the order of the tiles.
        eight: what the kernels made of them.
        kept: the lists.
        out, lse: what the kernels returned.
    """
    wanted, exact = ref.attend_eight_bits(eight, x.v.double(), kept, x.scale, x.mask)
    # A score less its maximum is one multiply-add of integers, 1.5 * 2^23 included: what is
    # subtracted is rounded by 2^-24 of that, so 0.9 units; the scales of up to 2^21 units by 0.4;
    # the result and the maxima that came before it by 0.5. In base 2; here in base e.
    unit = x.scale * eight.row_scale.double() * eight.key_scale.double().amax()
    off = 2 * unit
    terms = EPS * (x.k.shape[2] + 8)
    largest = x.v.nan_to_num(nan=0.0).double().abs().max()
    # Weights and outputs are rounded to the dtype of v: each by half of its eps, or, where fp16 has
    # no smaller numbers, by half of its least.
    eps, least = torch.finfo(x.v.dtype).eps, torch.finfo(x.v.dtype).smallest_normal
    rounding = eps * (1 + least * x.k.shape[2]) + terms
    error = (out.double() - wanted).abs().amax(-1)
    assert (error <= largest * (rounding + (2 * off).expm1())).all()
    empty = exact == -torch.inf
    assert (lse == -torch.inf).equal(empty)
    wrong = (lse.double() - exact).masked_fill(empty, 0).abs()
    size = exact.masked_fill(empty, 0).abs() + eight.row_shift.double().abs()
    assert (wrong <= off + terms + 4 * EPS * size).all()


class TestOnThreads:
    """The engine's kernel without a GPU: see ``gluon_threads``."""

    @FEWER
    @given(case=ON_HOPPER, dtype=HALVES, density=st.sampled_from([1.0, 0.5]))
    def test_output(self, case: Case, dtype: torch.dtype, density: float) -> None:
        x = case.make(dtype)
        kept = drawn_tiles(case, x, density)
        eight = ref.eight_bits(x.q.double(), x.k.double(), x.scale, x.mask)
        scales = tuple(t.float() for t in (eight.row_scale, eight.row_shift, eight.key_scale))
        out, lse = attend_on_threads(eight.q, eight.k, spoilt(x).v, kept, x, int8=scales)
        assert_attention(x, eight, kept, out, lse)


def _engines() -> list[str]:
    """The engine, where there is a GPU for it."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ["hopper-int8"] if hopper else []


@pytest.mark.gpu
@pytest.mark.parametrize("engine", _engines())
class TestOnHopper:
    @FEWER
    @given(
        case=ON_HOPPER,
        numbers=CONTROLS,
        dtype=HALVES,
        layout=st.sampled_from(["bhsd", "bshd"]),
        rule=st.sampled_from(c.PLANNED_RULES),
    )
    def test_output(
        self, engine: str, case: Case, numbers: Tensor, dtype: torch.dtype, layout: str, rule: str
    ) -> None:
        x = laid_out(on_device(case.make(dtype)), layout)
        got = planned(x, numbers, engine, rule=rule)
        assert c.ENGINES[int(got.measures[c.MEASURE_ENGINE])] == engine
        y = on_cpu(x)
        kept = listed(got.index, got.count, visible_tiles(y).shape[1])
        assert got.out.dtype == dtype
        assert got.out.transpose(1, 2).is_contiguous()
        assert_attention(y, of_reference(of_kernels(x)), kept, got.out.cpu(), got.lse.cpu())
        again = planned(x, numbers, engine, rule=rule)  # a race would show as other bits
        assert_same_bits(got, again)

    @FEWER
    @given(drawn=ORDERED, dtype=HALVES, recall=st.sampled_from([0.8, 1.0]))
    def test_token_order(
        self, engine: str, drawn: tuple[Layout, Case], dtype: torch.dtype, recall: float
    ) -> None:
        layout, case = drawn
        x = on_device(case.make(dtype))
        got = planned(x, control(recall), engine, layout=layout)
        tiled = arrange(x.k, x.mask, layout, variance_factor=variance_factor(x.scale))
        known = tiled.centroids
        eight = of_reference(
            eight_bits(
                x.q, tiled.k, known.stats, known.count, scale=x.scale, key_mask=tiled.key_mask
            )
        )
        places = ref.Places.of(layout, torch.device("cpu"))
        y = on_cpu(x)
        mask = places.put_mask(y.k, y.mask)
        y = y.replace(q=places.put(y.q), k=tiled.k.cpu(), v=places.put(y.v), mask=mask)

        def put(rows: Tensor) -> Tensor:
            return places.put(rows[..., None])[..., 0]

        moved = ref.EightBits(
            places.put(eight.q), put(eight.row_scale), put(eight.row_shift), eight.k,
            eight.key_scale,
        )  # fmt: skip
        n_n = c.tiles(layout.length, c.BLOCK_N)
        kept = listed(got.index.cpu(), got.count.cpu(), n_n)
        real = places.real
        assert real is not None
        out, lse = places.put(got.out.cpu()), put(got.lse.cpu())
        # Places without a token have no row: they are given what they would have.
        wanted, exact = ref.attend_eight_bits(moved, y.v.double(), kept, y.scale, y.mask)
        out = torch.where(real[:, None], out, wanted.to(out.dtype))
        lse = torch.where(real, lse, exact.to(lse.dtype))
        assert_attention(y, moved, kept, out, lse)

    @FEWER
    @given(drawn=ORDERED, dtype=HALVES)
    def test_is_the_filter_of_permuted_tokens(
        self, engine: str, drawn: tuple[Layout, Case], dtype: torch.dtype
    ) -> None:
        """Without text: bit for bit what one gets by permuting q, k, v and mask from outside."""
        layout, case = drawn
        layout, x, moved, order = permuted(layout, case.make(dtype))
        got = planned(on_device(x), control(0.8), engine, layout=layout)
        wanted = planned(on_device(moved), control(0.8), engine)
        assert same_bits(got.out.cpu()[:, :, order], wanted.out.cpu())
        assert same_bits(got.lse.cpu()[:, :, order], wanted.lse.cpu())
        assert torch.equal(got.count, wanted.count)

    @FEWER
    @given(case=ON_HOPPER, dtype=HALVES)
    def test_hidden_keys_never_matter(self, engine: str, case: Case, dtype: torch.dtype) -> None:
        x = on_device(case.make(dtype))
        assume(x.mask is not None)
        spoilt = x.spoil_hidden()
        got, wanted = planned(spoilt, control(0.8), engine), planned(x, control(0.8), engine)
        assert_same_bits(got, wanted)

    @FEWER
    @given(case=ON_HOPPER, dtype=HALVES)
    def test_nan_rows_keep_to_themselves(self, engine: str, case: Case, dtype: torch.dtype) -> None:
        x = on_device(case.make(dtype))
        assert_nan_row_keeps_to_itself(x, lambda x: planned(x, control(0.5), engine))

    def test_more_query_tiles_than_programs(self, engine: str) -> None:
        """Each program takes several, with lists of many lengths; the same plan as exact scores."""
        case = Case(2, kv_heads=8, q_len=3000, kv_len=4100, head_dim=128, value_dim=128, seed=1)
        x = on_device(case.make(torch.bfloat16))
        got = planned(x, control(log2=-4.0), engine)
        exact = launch.planned(x.q, x.k, x.v, control(log2=-4.0).to(DEVICE), **x.options)
        assert torch.equal(got.count, exact.count)
        y = on_cpu(x)
        kept = listed(got.index.cpu(), got.count.cpu(), visible_tiles(y).shape[1])
        assert_attention(y, of_reference(of_kernels(x)), kept, got.out.cpu(), got.lse.cpu())

    def test_in_a_cuda_graph(self, engine: str) -> None:
        case = Case(kv_heads=2, q_len=300, kv_len=700, head_dim=128, value_dim=128)
        x = on_device(case.make(torch.bfloat16))
        assert_replays(lambda numbers: planned(x, numbers, engine))

    @pytest.mark.parametrize(
        ("options", "other"),
        [
            ({"compensate": True, "length": 24_576}, "triton"),
            ({"dim": 64, "length": 24_576}, "hopper"),
            ({"length": 300}, "hopper"),
        ],
    )
    def test_where_it_is_not_possible_or_not_faster_scores_are_exact(
        self, engine: str, options: dict[str, object], other: str
    ) -> None:
        options = dict(options)
        dim, length = int(options.pop("dim", 128)), int(options.pop("length"))
        case = Case(q_len=length, kv_len=length, head_dim=dim, value_dim=dim)
        x = on_device(case.make(torch.bfloat16))
        numbers = control(0.8).to(DEVICE)
        got = launch.planned(x.q, x.k, x.v, numbers, **x.options, scores="int8", **options)
        wanted = launch.planned(x.q, x.k, x.v, numbers, **x.options, **options)
        assert c.ENGINES[int(got.measures[c.MEASURE_ENGINE])] == other != engine
        assert same_bits(got.out, wanted.out)
        assert same_bits(got.measures, wanted.measures)

    def test_where_it_is_faster_it_is_chosen(self, engine: str) -> None:
        case = Case(q_len=24_576, kv_len=24_576, head_dim=128, value_dim=128)
        x = on_device(case.make(torch.bfloat16))
        got = launch.planned(x.q, x.k, x.v, control(0.8).to(DEVICE), **x.options, scores="int8")
        assert c.ENGINES[int(got.measures[c.MEASURE_ENGINE])] == engine


@pytest.mark.parametrize("value", ["int4", "", None])
def test_unknown_scores(value: str) -> None:
    x = on_device(Case().make(torch.float16))
    with pytest.raises(ValueError, match="scores must be one of"):
        launch.planned(x.q, x.k, x.v, control().to(DEVICE), **x.options, scores=value)


def test_sums_and_their_start_fit_a_float() -> None:
    """Sums of 128 products stay in the mantissa of 1.5 * 2^23, where numbers are integers."""
    most = 128 * c.INT8_LIMIT**2
    bits = torch.tensor([0x4B400000], dtype=torch.int32)
    for s in (-most, -1, 0, 1, most):
        assert (bits + s).view(torch.float32).item() == 1.5 * 2**23 + s
    assert math.log2(most) < 22
