"""Scores of queries and keys in 8 bits: the rounding, its emulation, the engine that has them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    FEWER,
    LAYOUTS,
    MARKS,
    laid_out,
    on_cpu,
    on_device,
)
from support import Case, Inputs, cases, same_bits

from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref
from cef_compile.kernels.centroids import centroids
from cef_compile.kernels.eight_bits import EightBits, eight_bits
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
