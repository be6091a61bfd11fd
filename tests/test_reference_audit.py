"""The audit: exact energies, an honest sample, an interval that holds the truth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import RECALLS, SEEDS, Case, Inputs, achieved, cases, control, oracle, run, same_bits
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref

Z_95 = 1.96


def audit(x: Inputs, lse: Tensor, seed: int = 0, out: Tensor | None = None) -> tuple[float, ...]:
    """Recall and error, each with its standard error, and the norm."""
    out = oracle(x).out if out is None else out
    found = ref.audit(x.q, x.k, x.v, out, lse, torch.tensor(float(seed)), **x.options)
    return tuple(value.item() for value in found)


@pytest.fixture
def of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is a sample with few keys too, which would be looked at as a whole: they are
    what keeps these tests fast."""
    monkeypatch.setattr(c, "AUDIT_SMALL_PAIRS", 64)


def tile_recalls(total: int, low: float = 0.5) -> Tensor:
    draw = torch.Generator().manual_seed(total)
    return low + (1 - low) * torch.rand(total, generator=draw, dtype=torch.float64)


def lse_of(x: Inputs, recalls: Tensor) -> Tensor:
    """The lse that a filter would return if each query tile had the recall given, in its order."""
    batch, heads, q_len, _ = x.q.shape
    rows = recalls.view(batch, heads, -1).repeat_interleave(c.BLOCK_M, -1)[..., :q_len]
    return oracle(x).lse + rows.log()


def assert_error(result: ref.Result, x: Inputs) -> None:
    """The error of an audit that has looked at everything, against the oracle's."""
    exact = oracle(x)
    wanted = torch.where((exact.lse == -torch.inf)[..., None], 0, exact.out)
    off = (result.out.double() - wanted).norm().item()
    size = wanted.norm().item()
    error = result.measures[c.MEASURE_ERROR].item()
    # The oracle's output is off by its rounding, and float32 holds the measure.
    rounding = 4 * exact.rounding.amax().item() * x.v.abs().amax().item() * wanted.numel() ** 0.5
    assert abs(error * size - off) <= 2**-22 * off + rounding


class TestSample:
    @given(heads=st.integers(3, 128), tokens=st.integers(16_384, 2**18))
    def test_costs_two_percent_of_dense_at_most(self, heads: int, tokens: int) -> None:
        """In work: a sampled query tile does what dense attention does for it, both products."""
        total = heads * c.tiles(tokens, c.BLOCK_M)
        samples = c.audit_samples(total, c.tiles(tokens, c.BLOCK_N))
        assert 2 <= samples <= 0.02 * total
        assert samples <= 0.0075 * total or samples <= 7

    @given(total=st.integers(0, 10**6), kv_tiles=st.integers(0, 10**5))
    def test_sizes(self, total: int, kv_tiles: int) -> None:
        samples = c.audit_samples(total, kv_tiles)
        assert min(total, 2) <= samples <= total
        assert samples >= round(0.005 * total)
        if total <= 64 and total * kv_tiles <= 1920:
            assert samples == total  # a small node is looked at as a whole
        assert samples <= c.audit_samples(total + 1, kv_tiles)

    @given(total=st.integers(1, 200_000), kv_tiles=st.integers(1, 2000), seed=SEEDS)
    def test_one_tile_of_every_part(self, total: int, kv_tiles: int, seed: int) -> None:
        samples = c.audit_samples(total, kv_tiles)
        picks = c.audit_tiles(total, samples, torch.tensor(float(seed))).tolist()
        assert len(picks) == samples
        for part, pick in enumerate(picks):
            # Parts are equal on the real line: the last one's tile may begin the next.
            assert part * total // samples <= pick <= ((part + 1) * total - 1) // samples

    @given(total=st.integers(1, 64), seed=SEEDS)
    def test_few_tiles_are_all_taken(self, total: int, seed: int) -> None:
        picks = c.audit_tiles(total, c.audit_samples(total, 30), torch.tensor(float(seed)))
        assert picks.tolist() == list(range(total))

    def test_no_tile(self) -> None:
        assert c.audit_samples(0, 10) == 0

    def test_draws_are_even_and_differ_from_part_to_part(self) -> None:
        seeds, parts, size = 600, 64, 10
        picks = torch.stack(
            [c.audit_tiles(parts * size, parts, torch.tensor(float(s))) for s in range(seeds)]
        )
        offsets = picks - torch.arange(parts) * size
        for counts, cells in (
            (torch.bincount(offsets.flatten(), minlength=size), size),
            # of neighbouring parts and of neighbouring seeds together: no pattern
            (torch.bincount((offsets[:, :-1] * size + offsets[:, 1:]).flatten()), size**2),
            (torch.bincount((offsets[:-1] * size + offsets[1:]).flatten()), size**2),
        ):
            expected = counts.sum() / cells
            chi_square = ((counts - expected) ** 2 / expected).sum().item()
            freedom = cells - 1
            # Five standard deviations of chi square: one wrong alarm in a million draws of seeds.
            assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


class TestExactEnergies:
    @given(case=cases())
    def test_lse_of_all_keys(self, case: Case) -> None:
        x, dense = case.make(), oracle(case.make())
        for b in range(case.batch):
            mask = torch.ones(case.kv_len, dtype=torch.bool) if x.mask is None else x.mask[b]
            for h in range(case.heads):
                found = ref.exact_lse(x.q[b, h], x.k[b, h // case.group], mask, x.scale)
                empty = dense.lse[b, h] == -torch.inf
                assert torch.equal(found == -torch.inf, empty)
                off = (found - dense.lse[b, h])[~empty].abs()
                assert torch.all(off <= 2 * dense.rounding[b, h][~empty] + 1e-11)

    @given(case=cases())
    def test_output_over_all_keys(self, case: Case) -> None:
        x, dense = case.make(), oracle(case.make())
        for b in range(case.batch):
            mask = torch.ones(case.kv_len, dtype=torch.bool) if x.mask is None else x.mask[b]
            for h in range(case.heads):
                key, value = x.k[b, h // case.group], x.v[b, h // case.group]
                out, lse = ref.exact_attention(x.q[b, h], key, value, mask, x.scale)
                assert same_bits(lse, ref.exact_lse(x.q[b, h], key, mask, x.scale))
                # A hidden row is 0 here, and whatever SDPA makes of it there.
                wanted = torch.where((lse == -torch.inf)[:, None], 0, dense.out[b, h])
                allowed = 4 * dense.rounding[b, h, :, None] * value.abs().amax() + 1e-12
                assert torch.all((out - wanted).abs() <= allowed)

    def test_more_keys_than_one_chunk(self) -> None:
        x = Case(q_len=3, kv_len=5000, family="banded").make()
        mask = torch.arange(5000) % 7 > 0
        found = ref.exact_lse(x.q[0, 0], x.k[0, 0], mask, x.scale)
        wanted = (x.scale * (x.q[0, 0] @ x.k[0, 0].mT))[:, mask].logsumexp(-1)
        torch.testing.assert_close(found, wanted)
        out, _ = ref.exact_attention(x.q[0, 0], x.k[0, 0], x.v[0, 0], mask, x.scale)
        wanted = (x.scale * (x.q[0, 0] @ x.k[0, 0].mT)).masked_fill(~mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(out, wanted @ x.v[0, 0])

    @given(case=cases())
    def test_energies_of_tiles(self, case: Case) -> None:
        x = case.make()
        found = ref.tile_energies(x.q, x.k, x.scale, x.mask)
        parts = [part.logsumexp(-1) for part in oracle(x).scores.split(c.BLOCK_N, -1)]
        wanted = torch.stack(parts, -1)
        assert torch.equal(found == -torch.inf, wanted == -torch.inf)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-11)

    def test_energies_of_no_key(self) -> None:
        x = Case(q_len=5).make()
        assert ref.tile_energies(x.q, x.k[:, :, :0], x.scale).shape == (1, 1, 5, 0)


class TestAudit:
    @given(case=cases(), recall=RECALLS, seed=st.integers(0, 1000))
    def test_is_exact_where_every_tile_is_looked_at(
        self, case: Case, recall: float, seed: int
    ) -> None:
        x = case.make()
        result = ref.planned(x.q, x.k, x.v, control(recall, seed=seed), **x.options, audited=True)
        dense = oracle(x)
        got = achieved(result.lse, dense)
        got = got[~got.isnan()]  # rows that see no key have no recall
        wanted = got.mean().item() if got.numel() else 1.0
        measured = result.measures[c.MEASURE_RECALL].item()
        # float32 holds the measure, and the energies are off by the rounding of both sides.
        assert abs(measured - wanted) <= 2**-23 + 4 * dense.rounding.amax().item()
        assert result.measures[c.MEASURE_STDERR] == 0
        assert result.measures[c.MEASURE_ERROR_STDERR] == 0
        assert_error(result, x)

    @pytest.mark.parametrize("variant", ["online mean", "online row bound", "online lse"])
    @given(case=cases(), recall=RECALLS)
    def test_online_is_audited_too(self, variant: str, case: Case, recall: float) -> None:
        """Its error, and where the ledger holds bounds its recall; else that stays the ledger's."""
        x = case.make()
        result = run(variant, x, control(recall), audited=True)
        assert_error(result, x)
        got = achieved(result.lse, oracle(x))
        got = got[~got.isnan()]
        wanted = got.mean().item() if got.numel() else 1.0
        slack = 2**-23 + 4 * oracle(x).rounding.amax().item()
        assert abs(result.measures[c.MEASURE_RECALL].item() - wanted) <= slack
        if "bound" not in variant:
            plain = run(variant, x, control(recall)).measures
            assert same_bits(result.measures[: c.MEASURE_ERROR], plain[: c.MEASURE_ERROR])
            assert plain[c.MEASURE_ERROR : c.MEASURE_ENGINE].isnan().all()

    @given(case=cases(), recall=RECALLS)
    def test_changes_nothing_else(self, case: Case, recall: float) -> None:
        x = case.make()
        a, b = (
            ref.planned(x.q, x.k, x.v, control(recall), **x.options, audited=audited)
            for audited in (False, True)
        )
        assert same_bits(a.out, b.out)
        assert same_bits(a.histogram, b.histogram)
        others = [c.MEASURE_DENSITY, c.MEASURE_ESTIMATE]
        others += [c.MEASURE_LOG2_THRESHOLD, c.MEASURE_ENGINE]
        assert same_bits(a.measures[others], b.measures[others])
        audited = [c.MEASURE_RECALL, c.MEASURE_STDERR]
        audited += [c.MEASURE_ERROR, c.MEASURE_ERROR_STDERR, c.MEASURE_NORM]
        assert a.measures[audited].isnan().all()
        assert sorted(others + audited) == list(range(c.MEASURE_SIZE))

    @pytest.mark.parametrize(("q_len", "kv_len"), [(0, 65), (65, 0), (0, 0)])
    def test_of_nothing(self, q_len: int, kv_len: int) -> None:
        x = Case(q_len=65, kv_len=65).make()
        x = x.replace(q=x.q[:, :, :q_len], k=x.k[:, :, :kv_len], v=x.v[:, :, :kv_len])
        lse = torch.full((1, 1, q_len), -torch.inf, dtype=torch.float64)
        out = torch.zeros(1, 1, q_len, 8, dtype=torch.float64)
        assert audit(x, lse, out=out) == (1.0, 0.0, 0.0, 0.0, 0.0)

    def test_hidden_batch_elements_do_not_count(self) -> None:
        x = Case(batch=2, q_len=200, kv_len=65).make()
        mask = torch.ones(2, 65, dtype=torch.bool)
        mask[0] = False
        x = x.replace(mask=mask)
        lse = oracle(x).lse
        lse[1] += math.log(0.7)
        assert audit(x, lse)[0] == pytest.approx(0.7)

    def test_rows_count_alike_whatever_their_tile(self) -> None:
        x = Case(q_len=129, kv_len=65).make()  # a tile of 128 rows and one of a single row
        found, *_ = audit(x, lse_of(x, torch.tensor([0.5, 1.0]).double()))
        assert found == pytest.approx((128 * 0.5 + 1.0) / 129)

    def test_grouped_queries_use_their_own_keys(self) -> None:
        x = Case(kv_heads=2, group=3, batch=2, q_len=129, kv_len=65, mask="random").make()
        recalls = tile_recalls(2 * 6 * 2)
        rows = recalls.view(2, 6, 2).repeat_interleave(c.BLOCK_M, -1)[..., :129]
        assert audit(x, lse_of(x, recalls))[0] == pytest.approx(rows.mean().item())

    @pytest.mark.parametrize(
        ("batch", "heads", "q_len"),
        [(1, 2, 64 * 128), (64, 4, 16), (4, 8, 6 * 128)],
        ids=["2 to a part", "4 to a part", "3 to a part"],
    )
    def test_is_unbiased_and_inside_its_interval(
        self, of_64: None, batch: int, heads: int, q_len: int
    ) -> None:
        x = Case(batch=batch, kv_heads=heads, q_len=q_len, kv_len=9, head_dim=8).make()
        total = batch * heads * c.tiles(q_len, c.BLOCK_M)
        recalls = tile_recalls(total)
        lse, truth, runs = lse_of(x, recalls), recalls.mean().item(), 150
        found = torch.tensor([audit(x, lse, seed) for seed in range(runs)], dtype=torch.float64)
        errors, stderrs = found[:, 0] - truth, found[:, 1]
        # Five standard errors of the mean of the runs.
        assert abs(errors.mean()) < 5 * errors.std() / math.sqrt(runs)
        assert errors.std() > 0
        # The interval claims 95 %; a binomial sample of 150 is below 88 % once in 10,000 times.
        assert ((errors.abs() <= Z_95 * stderrs).double().mean()) >= 0.88
        # A stratified sample is a little better than the simple one that the error is made for.
        assert 0.5 < errors.std() / stderrs.mean() < 1.25

    def test_stderr_is_that_of_a_sample_without_replacement(self, of_64: None) -> None:
        x = Case(q_len=80 * 128, kv_len=9).make()
        recalls = tile_recalls(80)
        found, stderr, *_ = audit(x, lse_of(x, recalls), seed=3)
        picks = c.audit_tiles(80, 64, torch.tensor(3.0))
        assert found == pytest.approx(recalls[picks].mean().item())
        wanted = recalls[picks].std() * math.sqrt((1 - 64 / 80) / 64)
        assert stderr == pytest.approx(wanted.item())

    def test_seeds_give_different_samples(self, of_64: None) -> None:
        x = Case(q_len=128 * 128, kv_len=9).make()
        lse = lse_of(x, tile_recalls(128))
        found = {audit(x, lse, seed)[0] for seed in range(10)}
        assert len(found) == 10
        assert audit(x, lse, 3) == audit(x, lse, 3)
        before = torch.get_rng_state()
        audit(x, lse, 4)
        assert torch.equal(torch.get_rng_state(), before)

    def test_parts_of_unequal_size_are_unbiased_too(self, of_64: None) -> None:
        # 96 tiles in 64 parts: every third tile, here those of one head, is a part of its own.
        x = Case(batch=32, kv_heads=3, q_len=16, kv_len=9).make()
        recalls = torch.full((32, 3, 1), 0.95, dtype=torch.float64)
        recalls[:, 0] = 0.5
        lse, runs = lse_of(x, recalls), 60
        found = torch.tensor([audit(x, lse, seed) for seed in range(runs)], dtype=torch.float64)
        errors = found[:, 0] - recalls.mean()
        assert ((errors.abs() <= Z_95 * found[:, 1]).double().mean()) >= 0.8
        assert abs(errors.mean()) < found[:, 1].mean() / 2


class TestError:
    """Outputs that are wrong by a known amount in each query tile."""

    def wrong(self, x: Inputs, errors: Tensor) -> Tensor:
        """The exact output with its query tiles scaled, in their order, by 1 + error."""
        batch, heads, q_len, _ = x.q.shape
        rows = errors.view(batch, heads, -1).repeat_interleave(c.BLOCK_M, -1)[..., :q_len]
        return oracle(x).out * (1 + rows[..., None])

    @given(case=cases(mask="none"), error=st.floats(0, 2), seed=SEEDS)
    def test_scaled_output(self, case: Case, error: float, seed: int) -> None:
        x = case.make()
        total = case.batch * case.heads * c.tiles(case.q_len, c.BLOCK_M)
        out = self.wrong(x, torch.full((total,), error, dtype=torch.float64))
        _, _, found, stderr, norm = audit(x, oracle(x).lse, seed, out)
        rounding = 1e-7 + 1e3 * oracle(x).rounding.amax().item()
        assert found == pytest.approx(error, rel=1e-6, abs=rounding)
        if total == c.audit_samples(total, c.tiles(case.kv_len, c.BLOCK_N)):
            rows = case.batch * case.heads * case.q_len
            wanted = oracle(x).out.square().sum().item() / rows
            assert norm == pytest.approx(wanted, rel=1e-6 + rounding)
        assert stderr == 0

    @given(power=st.integers(-40, 40), error=st.floats(0.01, 1))
    def test_is_free_of_the_scale_of_v(self, power: int, error: float) -> None:
        x = Case(q_len=300, kv_len=9).make()
        errors = error * tile_recalls(3)
        scaled = x.replace(v=x.v * 2.0**power)
        lse = oracle(x).lse
        *same, norm = audit(x, lse, out=self.wrong(x, errors))
        found = audit(scaled, lse, out=self.wrong(scaled, errors))
        assert found == (*same, norm * 4.0**power)

    def test_what_is_exactly_right_and_what_should_be_nothing(self) -> None:
        x = Case(q_len=130, kv_len=9).make()
        nothing = x.replace(v=torch.zeros_like(x.v))
        lse, zero = oracle(x).lse, torch.zeros_like(oracle(x).out)
        assert audit(nothing, lse, out=zero)[2:] == (0.0, 0.0, 0.0)
        assert audit(nothing, lse, out=zero + 1)[2] == math.inf

    def test_nan_is_not_hidden(self) -> None:
        x = Case(q_len=130, kv_len=9).make()
        out = oracle(x).out
        out[0, 0, 5, 0] = torch.nan
        assert math.isnan(audit(x, oracle(x).lse, out=out)[2])

    @pytest.mark.parametrize(("heads", "q_len"), [(2, 64 * 128), (8, 24 * 128)])
    def test_is_inside_its_interval(self, of_64: None, heads: int, q_len: int) -> None:
        x = Case(kv_heads=heads, q_len=q_len, kv_len=9, head_dim=8).make()
        total = heads * c.tiles(q_len, c.BLOCK_M)
        errors = 0.1 * tile_recalls(total, low=0.2)
        lse, out, runs = oracle(x).lse, self.wrong(x, errors), 100
        exact = oracle(x).out
        truth = ((out - exact).norm() / exact.norm()).item()
        found = torch.tensor([audit(x, lse, seed, out) for seed in range(runs)]).double()
        off, stderrs = found[:, 2] - truth, found[:, 3]
        # A root is biased by variance / (8 * value^3) of its square: far below a standard error.
        assert abs(off.mean()) < 5 * off.std() / math.sqrt(runs)
        # As of recall: 95 % claimed, and a binomial sample of 100 is below 87 % once in 1,000.
        assert ((off.abs() <= Z_95 * stderrs).double().mean()) >= 0.87
        assert 0.5 < off.std() / stderrs.mean() < 1.25
