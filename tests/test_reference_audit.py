"""The audit: exact energies, an honest sample, an interval that holds the truth."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import RECALLS, SEEDS, Case, Inputs, achieved, cases, control, oracle, same_bits
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref

Z_95 = 1.96


def audit(x: Inputs, lse: Tensor, seed: int = 0) -> tuple[float, float]:
    mean, stderr = ref.audit(x.q, x.k, lse, torch.tensor(float(seed)), **x.options)
    return mean.item(), stderr.item()


def tile_recalls(total: int, low: float = 0.5) -> Tensor:
    draw = torch.Generator().manual_seed(total)
    return low + (1 - low) * torch.rand(total, generator=draw, dtype=torch.float64)


def lse_of(x: Inputs, recalls: Tensor) -> Tensor:
    """The lse that a filter would return if each query tile had the recall given, in its order."""
    batch, heads, q_len, _ = x.q.shape
    rows = recalls.view(batch, heads, -1).repeat_interleave(c.BLOCK_M, -1)[..., :q_len]
    return oracle(x).lse + rows.log()


class TestSample:
    @given(total=st.integers(1, 200_000), seed=SEEDS)
    def test_one_tile_of_every_part(self, total: int, seed: int) -> None:
        samples = c.audit_samples(total)
        assert samples == min(total, max(64, round(total / 100)))
        picks = c.audit_tiles(total, samples, torch.tensor(float(seed))).tolist()
        assert len(picks) == samples
        for part, pick in enumerate(picks):
            # Parts are equal on the real line: the last one's tile may begin the next.
            assert part * total // samples <= pick <= ((part + 1) * total - 1) // samples

    @given(total=st.integers(1, 64), seed=SEEDS)
    def test_few_tiles_are_all_taken(self, total: int, seed: int) -> None:
        picks = c.audit_tiles(total, c.audit_samples(total), torch.tensor(float(seed)))
        assert picks.tolist() == list(range(total))

    def test_no_tile(self) -> None:
        assert c.audit_samples(0) == 0

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

    def test_more_keys_than_one_chunk(self) -> None:
        x = Case(q_len=3, kv_len=5000, family="banded").make()
        mask = torch.arange(5000) % 7 > 0
        found = ref.exact_lse(x.q[0, 0], x.k[0, 0], mask, x.scale)
        wanted = (x.scale * (x.q[0, 0] @ x.k[0, 0].mT))[:, mask].logsumexp(-1)
        torch.testing.assert_close(found, wanted)

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

    @given(case=cases(), recall=RECALLS)
    def test_changes_nothing_else(self, case: Case, recall: float) -> None:
        x = case.make()
        a, b = (
            ref.planned(x.q, x.k, x.v, control(recall), **x.options, audited=audited)
            for audited in (False, True)
        )
        assert same_bits(a.out, b.out)
        assert same_bits(a.histogram, b.histogram)
        others = [c.MEASURE_DENSITY, c.MEASURE_ESTIMATE, c.MEASURE_LOG2_THRESHOLD]
        assert same_bits(a.measures[others], b.measures[others])
        assert a.measures[[c.MEASURE_RECALL, c.MEASURE_STDERR]].isnan().all()

    @pytest.mark.parametrize(("q_len", "kv_len"), [(0, 65), (65, 0), (0, 0)])
    def test_of_nothing(self, q_len: int, kv_len: int) -> None:
        x = Case(q_len=65, kv_len=65).make()
        x = x.replace(q=x.q[:, :, :q_len], k=x.k[:, :, :kv_len])
        lse = torch.full((1, 1, q_len), -torch.inf, dtype=torch.float64)
        assert audit(x, lse) == (1.0, 0.0)

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
        found, _ = audit(x, lse_of(x, torch.tensor([0.5, 1.0]).double()))
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
    def test_is_unbiased_and_inside_its_interval(self, batch: int, heads: int, q_len: int) -> None:
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

    def test_error_is_that_of_a_sample_without_replacement(self) -> None:
        x = Case(q_len=80 * 128, kv_len=9).make()
        recalls = tile_recalls(80)
        found, stderr = audit(x, lse_of(x, recalls), seed=3)
        picks = c.audit_tiles(80, 64, torch.tensor(3.0))
        assert found == pytest.approx(recalls[picks].mean().item())
        wanted = recalls[picks].std() * math.sqrt((1 - 64 / 80) / 64)
        assert stderr == pytest.approx(wanted.item())

    def test_seeds_give_different_samples(self) -> None:
        x = Case(q_len=128 * 128, kv_len=9).make()
        lse = lse_of(x, tile_recalls(128))
        found = {audit(x, lse, seed)[0] for seed in range(10)}
        assert len(found) == 10
        assert audit(x, lse, 3) == audit(x, lse, 3)
        before = torch.get_rng_state()
        audit(x, lse, 4)
        assert torch.equal(torch.get_rng_state(), before)

    def test_parts_of_unequal_size_are_unbiased_too(self) -> None:
        # 96 tiles in 64 parts: every third tile, here those of one head, is a part of its own.
        x = Case(batch=32, kv_heads=3, q_len=16, kv_len=9).make()
        recalls = torch.full((32, 3, 1), 0.95, dtype=torch.float64)
        recalls[:, 0] = 0.5
        lse, runs = lse_of(x, recalls), 60
        found = torch.tensor([audit(x, lse, seed) for seed in range(runs)], dtype=torch.float64)
        errors = found[:, 0] - recalls.mean()
        assert ((errors.abs() <= Z_95 * found[:, 1]).double().mean()) >= 0.8
        assert abs(errors.mean()) < found[:, 1].mean() / 2
