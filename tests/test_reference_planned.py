"""The planned filter: centroids, ranks, the threshold, the lists, attention over them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import (
    RECALLS,
    SEEDS,
    Case,
    Dense,
    Inputs,
    assert_attention,
    by_element,
    cases,
    control,
    estimated_shares,
    near_edge,
    oracle,
    same_bits,
    target,
    visible_tiles,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref

EPS = torch.finfo(torch.float64).eps
many_tiles = {"q_len": st.sampled_from([1, 129, 200, 257]), "kv_len": st.sampled_from([257, 577])}


def planned(x: Inputs, numbers: Tensor, **more) -> ref.Result:
    return ref.planned(x.q, x.k, x.v, numbers, **x.options, **more)


def plan_of(x: Inputs, row_stride: int = c.PLAN_ROW_STRIDE) -> ref.Plan:
    return ref.plan(x.q, ref.centroids(x.k, x.mask), x.scale, row_stride)


def by_query_tile(shares: Tensor, row_stride: int = c.PLAN_ROW_STRIDE) -> list[Tensor]:
    return list(shares.split(c.BLOCK_M // row_stride, 2))


class TestBins:
    @given(exponent=st.floats(-20, 0), tail=st.floats(1e-3, 0.999))
    def test_bin_holds_the_ranks_between_its_edges(self, exponent: float, tail: float) -> None:
        steps = math.floor((exponent + c.RANK_OCTAVES) * c.BINS_PER_OCTAVE) + tail
        rank = 2.0 ** (steps / c.BINS_PER_OCTAVE - c.RANK_OCTAVES)
        for dtype in (torch.float32, torch.float64):
            found = int(c.rank_bin(torch.tensor(rank, dtype=dtype)))
            assert found == min(max(math.floor(steps), 0), c.TOP_BIN)

    def test_special_ranks(self) -> None:
        ranks = torch.tensor([0.0, 1e-30, 1.0, math.nan, 0.5, 2.0**-16])
        assert c.rank_bin(ranks).tolist() == [0, 0, 255, 255, 240, 0]
        assert c.rank_bin(ranks).dtype == torch.uint8

    def test_edges_and_bins_are_inverse(self) -> None:
        bins = torch.arange(c.RANK_BINS)
        edges = c.log2_edge(bins)
        assert torch.equal(c.edge_bin(edges), bins)
        assert torch.equal(c.rank_bin(edges.double().exp2() * (1 + 1e-9)).long(), bins)
        # A threshold inside a bin takes the next one: no kept tile is below it.
        assert torch.equal(c.edge_bin(edges[:-1] + 0.01), bins[1:])
        assert c.edge_bin(torch.tensor([0.0, -99.0])).tolist() == [c.TOP_BIN, 0]

    @given(seed=SEEDS, filled=st.integers(1, c.RANK_BINS), recall=RECALLS)
    def test_threshold_bin_is_the_highest_that_reaches_the_recall(
        self, seed: int, filled: int, recall: float
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        curve = torch.zeros(c.RANK_BINS, dtype=torch.float64)
        where = torch.randperm(c.RANK_BINS, generator=draw)[:filled]
        curve[where] = torch.rand(filled, generator=draw, dtype=torch.float64)
        curve /= curve.sum()
        found = int(c.threshold_bin(curve, torch.tensor(recall, dtype=torch.float64)))
        above = [math.fsum(curve[b:].tolist()) for b in range(c.RANK_BINS)]
        rounding = c.RANK_BINS * EPS  # of a sum of that many terms
        assert above[found] >= recall - rounding
        assert found == c.TOP_BIN or above[found + 1] < recall + rounding

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_threshold_bin_at_the_ends(self, dtype: torch.dtype) -> None:
        curves = torch.zeros(4, c.RANK_BINS, dtype=dtype)
        curves[0, 200] = 1
        curves[1, [100, 200]] = 0.5
        curves[2, :] = 0.999 / c.RANK_BINS  # rounding took a little of it
        recalls = torch.tensor([0.5, 0.5, 0.9999, 0.5])  # the last one sees nothing
        assert c.threshold_bin(curves, recalls).tolist() == [200, 200, 0, 0]
        assert c.threshold_bin(curves[:2], torch.tensor([1.0, 0.501])).tolist() == [0, 100]
        assert c.threshold_bin(curves[1], torch.tensor(1.0)).tolist() == 0


class TestCentroids:
    @given(case=cases(q_len=1, value_dim=1))
    def test_are_the_moments_of_the_visible_keys(self, case: Case) -> None:
        x = case.make()
        found = ref.centroids(x.k, x.mask)
        for b in range(case.batch):
            for j in range(c.tiles(case.kv_len, c.BLOCK_N)):
                at = slice(j * c.BLOCK_N, (j + 1) * c.BLOCK_N)
                keys = x.k[b, :, at]
                if x.mask is not None:
                    keys = keys[:, x.mask[b, at]]
                count = keys.shape[1]
                assert found.count[b, j] == count
                if not count:
                    assert torch.all(found.mean[b, :, j] == 0)
                    assert torch.all(found.variance[b, :, j] == 0)
                    continue
                size = keys.abs().amax()
                assert torch.all((found.mean[b, :, j] - keys.mean(1)).abs() <= 128 * EPS * size)
                spread = (found.variance[b, :, j] - keys.var(1, correction=0)).abs()
                assert torch.all(spread <= 256 * EPS * size**2)

    def test_variance_does_not_cancel_far_from_zero(self) -> None:
        draw = torch.Generator().manual_seed(0)
        keys = (torch.randn(1, 1, 64, 8, generator=draw) + 1e4).float()
        found = ref.centroids(keys).variance.double()[0, 0, 0]
        wanted = keys.double().var(2, correction=0)[0, 0]
        # The mean is off by 64 roundings of 1e4 at most, 0.04, which enters squared. A sum of
        # squares less the squared mean would be off by as many roundings of 1e8.
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.04**2)


class TestPlan:
    @given(case=cases(**many_tiles))
    def test_ranks_and_energies_follow_the_formula(self, case: Case) -> None:
        x = case.make()
        found, shares = plan_of(x), estimated_shares(x)
        assert torch.equal(found.visible, visible_tiles(x))
        for t, rows in enumerate(by_query_tile(shares)):
            rank = rows.amax(2)  # [B, H, Tn]
            bins = found.bins[:, :, t].long()
            wanted = c.rank_bin(rank.clamp_min(0)).long()
            best = rank >= rank.amax(-1, keepdim=True)  # ties included
            tops = bins == c.TOP_BIN
            seen = found.visible[:, None].expand_as(bins)
            off = (bins != wanted) & seen & ~(tops & (rank >= rank.amax(-1, True) - 1e-9))
            assert torch.all(near_edge(rank)[off])
            assert torch.all((bins - wanted).abs()[off & ~best] <= 1)
            # The best tile is in the top bin wherever the query tile sees one.
            good = (rank >= rank.amax(-1, keepdim=True) - 1e-9) & seen & tops
            assert torch.equal(good.any(-1), seen.any(-1))
            energy = rows.clamp_min(0).sum(2).nan_to_num(nan=0.0).masked_fill(~seen, 0)
            torch.testing.assert_close(found.energy[:, :, t], energy, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("q_len", [1, 2, 2047, 2049, 2177])
    def test_long_queries_are_planned_in_chunks(self, q_len: int) -> None:
        x = Case(q_len=q_len, kv_len=200, family="banded").make()
        found, shares = plan_of(x), estimated_shares(x)
        wanted = torch.stack([rows.sum(2) for rows in by_query_tile(shares)], 2)
        torch.testing.assert_close(found.energy, wanted, rtol=1e-9, atol=1e-12)
        # Each row that was looked at brings energy 1.
        assert found.energy.sum().item() == pytest.approx(-(-q_len // c.PLAN_ROW_STRIDE))

    def test_variance_is_what_a_gaussian_tile_needs(self) -> None:
        # Two tiles of mean 0: the one with spread holds exp(scale^2 q^2 s^2 / 2) times as much.
        keys = torch.zeros(1, 1, 128, 8, dtype=torch.float64)
        keys[0, 0, 0:64:2, 0], keys[0, 0, 1:64:2, 0] = 1, -1
        query = torch.full((1, 1, 1, 8), 2.0, dtype=torch.float64)
        found = ref.plan(query, ref.centroids(keys), 0.5)
        ratio = found.energy[0, 0, 0, 0] / found.energy[0, 0, 0, 1]
        assert ratio.item() == pytest.approx(math.exp(0.5 * 0.25 * 4))

    @given(case=cases(**many_tiles))
    def test_histogram_counts_visible_pairs(self, case: Case) -> None:
        x = case.make()
        found = plan_of(x)
        histogram = found.histogram()
        assert histogram.shape == (2, c.RANK_BINS)
        energy, pairs = [0.0] * c.RANK_BINS, [0] * c.RANK_BINS
        seen = found.visible[:, None, None].expand_as(found.bins)
        for bin_, part in zip(found.bins[seen].tolist(), found.energy[seen].tolist(), strict=True):
            energy[bin_] += part
            pairs[bin_] += 1
        total, count = sum(energy), sum(pairs)
        torch.testing.assert_close(
            histogram[0], torch.tensor(energy, dtype=torch.float64) / (total or 1)
        )
        torch.testing.assert_close(
            histogram[1], torch.tensor(pairs, dtype=torch.float64) / (count or 1)
        )

    @given(case=cases(mask="none", **many_tiles), seed=SEEDS)
    def test_order_of_keys_inside_a_tile_does_not_matter(self, case: Case, seed: int) -> None:
        x = case.make()
        draw = torch.Generator().manual_seed(seed)
        starts = range(0, case.kv_len, c.BLOCK_N)
        order = torch.cat(
            [s + torch.randperm(min(c.BLOCK_N, case.kv_len - s), generator=draw) for s in starts]
        )
        moved = x.replace(k=x.k[:, :, order], v=x.v[:, :, order])
        self.assert_same_plan(x, moved)

    @given(case=cases(**many_tiles), seed=SEEDS)
    def test_one_vector_added_to_all_keys_does_not_matter(self, case: Case, seed: int) -> None:
        x = case.make()
        draw = torch.Generator().manual_seed(seed)
        shift = torch.randn(case.head_dim, generator=draw, dtype=torch.float64)
        self.assert_same_plan(x, x.replace(k=x.k + shift))

    @staticmethod
    def assert_same_plan(a: Inputs, b: Inputs) -> None:
        """Equal bins but where rounding decides, and the same output from the same lists."""
        one, two = plan_of(a), plan_of(b)
        rank = torch.stack([rows.amax(2) for rows in by_query_tile(estimated_shares(a))], 2)
        off = (one.bins != two.bins) & one.visible[:, None, None]
        tied = rank >= rank.amax(-1, keepdim=True) - 1e-9  # the best tile is any of these
        assert torch.all((near_edge(rank) | tied)[off])
        torch.testing.assert_close(one.energy, two.energy, rtol=1e-7, atol=1e-9)
        kept, _ = ref.choose(one, one.histogram(), control(0.7), "threshold")
        outs = [ref.attend(x.q, x.k, x.v, kept, x.scale, x.mask)[0] for x in (a, b)]
        rounding = oracle(a, kept).rounding + oracle(b, kept).rounding
        error = (outs[0] - outs[1]).abs()
        assert torch.all(error <= rounding[..., None] * a.v.abs().amax())


class TestThreshold:
    @given(case=cases(**many_tiles), recall=RECALLS)
    def test_keeps_what_is_at_or_above_the_threshold_of_the_recall(
        self, case: Case, recall: float
    ) -> None:
        x = case.make()
        numbers = control(recall)
        result, found = planned(x, numbers), plan_of(x)
        curve = found.histogram()[0]
        assert torch.equal(result.histogram[0], curve.float())
        log2 = result.measures[c.MEASURE_LOG2_THRESHOLD]
        edge = int(c.edge_bin(log2))
        assert float(log2) == edge / c.BINS_PER_OCTAVE - c.RANK_OCTAVES
        seen = found.visible[:, None, None]
        assert torch.equal(result.kept, (found.bins >= edge) & seen)
        total = found.energy.sum().item()
        if not total:
            assert result.measures[c.MEASURE_ESTIMATE] == 1
            return
        estimate = (found.energy * result.kept).sum().item() / total
        assert result.measures[c.MEASURE_ESTIMATE].item() == pytest.approx(estimate, rel=1e-6)
        rounding = c.RANK_BINS * EPS * found.energy.numel()
        assert estimate >= target(numbers) - rounding
        if edge < c.TOP_BIN:
            fewer = (found.energy * (found.bins > edge)).sum().item() / total
            assert fewer < target(numbers) + rounding

    @given(case=cases(**many_tiles), log2=st.floats(-16, 0, width=32))
    def test_given_threshold_keeps_by_rank_and_always_the_best(
        self, case: Case, log2: float
    ) -> None:
        x = case.make()
        result = planned(x, control(0.5, log2=log2))
        shares = estimated_shares(x)
        edge = -16 + math.ceil((log2 + 16) * 16) / 16  # thresholds are whole bins
        # Above 2^(-1/16) there is but one bin, the top one.
        edge = min(edge, -1 / 16)
        assert result.measures[c.MEASURE_LOG2_THRESHOLD] == edge
        for t, rows in enumerate(by_query_tile(shares)):
            rank = rows.amax(2)
            kept = result.kept[:, :, t]
            seen = visible_tiles(x)[:, None].expand_as(kept)
            above = (rank >= 2.0**edge) & seen
            near = (rank.clamp_min(1e-300).log2() - edge).abs() < 1e-8
            ties = (rank >= rank.amax(-1, keepdim=True) - 1e-9) & seen
            assert torch.all((kept == above) | near | ties)
            assert torch.equal((kept & ties).any(-1), seen.any(-1)), "a best tile was dropped"
            ranks_and_best = ((rank >= 2.0**edge * (1 - 1e-8)) & seen).sum(-1) + 1
            assert torch.all(kept.sum(-1) <= ranks_and_best)

    @pytest.mark.parametrize("log2", [0.0, -0.03])
    def test_only_the_best_tile_is_left_at_the_highest_threshold(self, log2: float) -> None:
        x = Case(q_len=257, kv_len=577).make()
        result = planned(x, control(0.5, log2=log2))
        rank = torch.stack([rows.amax(2) for rows in by_query_tile(estimated_shares(x))], 2)
        assert rank.max() < 2 ** (-1 / 16)
        assert torch.equal(result.kept.sum(-1), torch.ones(1, 1, 3, dtype=torch.int64))
        assert torch.equal(result.kept.long().argmax(-1), rank.argmax(-1))

    @given(
        case=cases(**many_tiles),
        recalls=st.tuples(RECALLS, RECALLS).map(sorted),
        rule=st.sampled_from(["threshold", "top_p", "top_k"]),
    )
    def test_kept_sets_are_nested_in_recall(
        self, case: Case, recalls: list[float], rule: str
    ) -> None:
        found = plan_of(case.make())
        histogram = found.histogram()
        few, many = (ref.choose(found, histogram, control(r), rule)[0] for r in recalls)
        assert not torch.any(few & ~many)

    def test_fixed_threshold_wins_over_the_recall(self) -> None:
        x = Case(kv_len=577).make()
        a, b = (planned(x, control(r, threshold=0.03)) for r in (0.1, 1.0))
        assert torch.equal(a.kept, b.kept)
        assert not a.kept.all()

    def test_head_with_spread_attention_gets_more_tiles(self) -> None:
        # One threshold for the node: the recall is the node's, not that of each head.
        spread = Case(kv_heads=2, q_len=128, kv_len=577, seed=3).make()
        spread.q[:, 0] *= 0.1
        result = planned(spread, control(0.8))
        counts = result.kept.sum((0, 2, 3))
        assert counts[0] != counts[1]

    def test_delivers_about_the_recall_on_gaussian_keys(self) -> None:
        # Keys drawn as the estimate assumes: what is delivered is what was promised.
        draw = torch.Generator().manual_seed(0)
        means = 1.5 * torch.randn(1, 4, 40, 1, 16, generator=draw, dtype=torch.float64)
        noise = torch.randn(1, 4, 40, 64, 16, generator=draw, dtype=torch.float64)
        k = (means + noise).flatten(2, 3)
        q = torch.randn(1, 4, 256, 16, generator=draw, dtype=torch.float64)
        x = Inputs(q, k, k, 0.25, None)
        for recall in (0.95, 0.9, 0.7):
            result = planned(x, control(recall))
            delivered = (result.lse - oracle(x).lse).exp().mean().item()
            # A bin is 4.4 % of threshold; the sample of 64 keys bends each tile's energy by some %.
            assert delivered == pytest.approx(recall, abs=0.02)
            assert result.measures[c.MEASURE_DENSITY] < recall


class TestTopK:
    @given(case=cases(**many_tiles), sixteenths=st.integers(1, 16))
    def test_keeps_the_best_tiles_of_every_query_tile(self, case: Case, sixteenths: int) -> None:
        x = case.make()
        result, found = planned(x, control(sixteenths / 16), rule="top_k"), plan_of(x)
        assert math.isnan(result.measures[c.MEASURE_LOG2_THRESHOLD])
        for b in range(case.batch):
            seen = [j for j, is_seen in enumerate(found.visible[b].tolist()) if is_seen]
            wanted = math.ceil(Fraction(sixteenths, 16) * len(seen))
            for h in range(case.heads):
                for t in range(found.bins.shape[2]):
                    bins = found.bins[b, h, t].tolist()
                    best = sorted(seen, key=lambda j, bins=bins: (-bins[j], j))[:wanted]
                    assert result.kept[b, h, t].nonzero().flatten().tolist() == sorted(best)


class TestTopP:
    @given(case=cases(**many_tiles), recall=RECALLS)
    def test_keeps_the_fewest_best_tiles_that_carry_the_share(
        self, case: Case, recall: float
    ) -> None:
        x = case.make()
        numbers = control(recall)
        result, found = planned(x, numbers, rule="top_p"), plan_of(x)
        for b in range(case.batch):
            seen = [j for j, is_seen in enumerate(found.visible[b].tolist()) if is_seen]
            for h in range(case.heads):
                for t in range(found.bins.shape[2]):
                    bins, energy = found.bins[b, h, t].tolist(), found.energy[b, h, t].tolist()
                    order = sorted(seen, key=lambda j, bins=bins: (-bins[j], j))
                    kept = result.kept[b, h, t].nonzero().flatten().tolist()
                    assert kept == sorted(order[: len(kept)]), "not the best ones"
                    if not seen:
                        continue
                    total = math.fsum(energy)
                    slack = 32 * EPS * total
                    carried = [
                        math.fsum(energy[j] for j in order[:n]) for n in range(len(seen) + 1)
                    ]
                    assert carried[len(kept)] >= target(numbers) * total - slack
                    assert len(kept) >= 1
                    assert len(kept) == 1 or (
                        carried[len(kept) - 1] < target(numbers) * total + slack
                    ), "one tile fewer would do"

    def test_a_share_that_is_reached_exactly_is_enough(self) -> None:
        energy = torch.tensor([0.25, 0.5, 0.25, 0.0], dtype=torch.float64)[None, None, None]
        bins = torch.tensor([224, 255, 224, 0], dtype=torch.uint8)[None, None, None]
        made = ref.Plan(bins, energy, torch.ones(1, 4, dtype=torch.bool))
        for recall, count in ((0.25, 1), (0.5, 1), (0.625, 2), (0.75, 2), (0.875, 3), (1.0, 4)):
            kept, _ = ref.choose(made, made.histogram(), control(recall), "top_p")
            assert int(kept.sum()) == count


class TestAttend:
    @given(case=cases(**many_tiles), seed=SEEDS, density=st.sampled_from([0.0, 0.2, 0.7]))
    def test_any_lists(self, case: Case, seed: int, density: float) -> None:
        x = case.make()
        kept = self.draw_lists(case, seed, density)
        out, lse = ref.attend(x.q, x.k, x.v, kept, x.scale, x.mask)
        assert_attention(out, lse, oracle(x, kept), x.v)

    @given(case=cases(mask="none", **many_tiles), seed=SEEDS)
    def test_dropped_keys_and_values_are_not_read(self, case: Case, seed: int) -> None:
        x = case.make()
        kept = self.draw_lists(case, seed, 0.5)
        out, lse = ref.attend(x.q, x.k, x.v, kept, x.scale)
        for b in range(case.batch):
            for h in range(case.heads):
                for t in range(kept.shape[2]):
                    k, v = x.k.clone(), x.v.clone()
                    where = ~by_element(kept[b, h, t : t + 1], 1, case.kv_len)[0]
                    k[b, h // case.group, where] = torch.nan
                    v[b, h // case.group, where] = torch.nan
                    rows = slice(t * c.BLOCK_M, (t + 1) * c.BLOCK_M)
                    again, its_lse = ref.attend(x.q, k, v, kept, x.scale)
                    assert same_bits(again[b, h, rows], out[b, h, rows])
                    assert same_bits(its_lse[b, h, rows], lse[b, h, rows])

    @given(case=cases(mask="none", **many_tiles), seed=SEEDS, density=st.floats(0, 1))
    def test_work_is_that_of_the_kept_tiles(self, case: Case, seed: int, density: float) -> None:
        x = case.make(torch.float32)
        kept = self.draw_lists(case, seed, density)
        with FlopCounterMode(display=False) as counter:
            ref.attend(x.q, x.k, x.v, kept, x.scale)
        products = int(by_element(kept, case.q_len, case.kv_len).sum())
        assert counter.get_total_flops() == 2 * products * (case.head_dim + case.value_dim)

    @staticmethod
    def draw_lists(case: Case, seed: int, density: float) -> Tensor:
        shape = (
            case.batch,
            case.heads,
            c.tiles(case.q_len, c.BLOCK_M),
            c.tiles(case.kv_len, c.BLOCK_N),
        )
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


class TestCompensation:
    @given(case=cases(**many_tiles))
    def test_changes_nothing_where_nothing_is_dropped(self, case: Case) -> None:
        x = case.make()
        a, b = planned(x, control(1.0)), planned(x, control(1.0), compensate=True)
        assert same_bits(a.out, b.out)
        assert same_bits(a.lse, b.lse)

    @given(case=cases(**many_tiles), recall=RECALLS)
    def test_dropped_tiles_come_back_as_one_token_each(self, case: Case, recall: float) -> None:
        x = case.make()
        result = planned(x, control(recall), compensate=True)
        plain = planned(x, control(recall))
        assert torch.equal(result.kept, plain.kept)
        assert same_bits(result.lse, plain.lse), "the ledger is of the kept tiles alone"
        keys, values = ref.centroids(x.k, x.mask), ref.centroids(x.v, x.mask)
        group = case.group
        exact = oracle(x, result.kept)
        mean = keys.mean.repeat_interleave(group, 1)
        pseudo = x.scale * x.q @ mean.mT + keys.count.log()[:, None, None]
        dropped = (~result.kept & (keys.count > 0)[:, None, None]).repeat_interleave(c.BLOCK_M, 2)[
            :, :, : case.q_len
        ]
        scores = pseudo.masked_fill(~dropped, -torch.inf)
        weights = torch.cat((exact.scores, scores), -1).softmax(-1).nan_to_num(nan=0.0)
        v = x.v if x.mask is None else torch.where(x.mask[:, None, :, None], x.v, 0)
        v = torch.cat((v, values.mean), 2).repeat_interleave(group, 1)
        wanted = weights @ v
        rounding = oracle(x).rounding[..., None] * x.v.abs().amax()
        assert torch.all((result.out - wanted).abs() <= 2 * rounding)

    def test_is_exact_for_tiles_of_equal_keys(self) -> None:
        draw = torch.Generator().manual_seed(1)
        k = torch.randn(1, 1, 6, 1, 8, generator=draw, dtype=torch.float64)
        k = k.expand(-1, -1, -1, 64, -1).flatten(2, 3)
        v = torch.randn(1, 1, 384, 8, generator=draw, dtype=torch.float64)
        q = torch.randn(1, 1, 70, 8, generator=draw, dtype=torch.float64)
        x = Inputs(q, k, v, 1.0, None)
        result = planned(x, control(0.5), compensate=True)
        assert not result.kept.all()
        wanted: Dense = oracle(x)
        error = (result.out - wanted.out).abs()
        assert torch.all(error <= 2 * wanted.rounding[..., None] * v.abs().amax())


class TestShared:
    @given(recall=RECALLS, seed=SEEDS)
    def test_a_batch_element_of_equal_data_changes_no_decision(
        self, recall: float, seed: int
    ) -> None:
        x = Case(kv_heads=2, kv_len=577, q_len=129, seed=seed).make()
        twice = x.replace(**{name: getattr(x, name).repeat(2, 1, 1, 1) for name in "qkv"})
        a, b = planned(x, control(recall)), planned(twice, control(recall))
        assume(bool((a.histogram[0].flip(0).cumsum(0) - recall).abs().min() > 1e-6))
        assert torch.equal(a.kept, b.kept[:1])
        assert torch.equal(b.kept[:1], b.kept[1:])
        assert same_bits(b.out[:1], b.out[1:])
