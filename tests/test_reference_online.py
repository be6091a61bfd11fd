"""The online filter: its certificates, its ledger, the rules of the literature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import (
    CERTIFIED,
    RECALLS,
    SEEDS,
    VARIANTS,
    Case,
    Dense,
    Inputs,
    achieved,
    by_element,
    by_query_tile,
    cases,
    control,
    oracle,
    run,
    same_bits,
    target,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref

certified = st.sampled_from(CERTIFIED)
online_variants = [name for name in VARIANTS if name.startswith("online")]
tiled = {"q_len": st.sampled_from([1, 65, 129, 200]), "kv_len": st.sampled_from([200, 257, 577])}


def online(x: Inputs, numbers: Tensor, **more) -> ref.Result:
    return ref.online(x.q, x.k, x.v, numbers, **x.options, **more)


def ledger_rounding(dense: Dense, kv_len: int) -> Tensor:
    """How far a recall may be off: energies are off by the rounding, in two sums over all tiles."""
    return 2 * dense.rounding + kv_len * torch.finfo(torch.float64).eps


class TestCertificate:
    @given(case=cases(), recall=RECALLS, bound=st.booleans())
    def test_mean_recall_of_every_query_tile(self, case: Case, recall: float, bound: bool) -> None:
        x, numbers = case.make(), control(recall)
        result, dense = online(x, numbers, certify="mean", bound=bound), oracle(case.make())
        got = achieved(result.lse, dense).nan_to_num(nan=1.0)
        eps = ledger_rounding(dense, case.kv_len).amax()
        for rows in by_query_tile(got):
            assert torch.all(rows.mean(-1) >= target(numbers) - eps)

    @given(case=cases(), recall=RECALLS, bound=st.booleans())
    def test_recall_of_every_row(self, case: Case, recall: float, bound: bool) -> None:
        x, numbers = case.make(), control(recall)
        result, dense = online(x, numbers, certify="row", bound=bound), oracle(case.make())
        got = achieved(result.lse, dense).nan_to_num(nan=1.0)
        assert torch.all(got >= target(numbers) - ledger_rounding(dense, case.kv_len))

    @given(case=cases(), recall=RECALLS, certify=st.sampled_from(["mean", "row"]))
    def test_target_ledger_and_recall_ascend_with_bounds(
        self, case: Case, recall: float, certify: str
    ) -> None:
        # The recall from the kept tiles and the scores alone, with nothing that the filter summed.
        x, numbers = case.make(), control(recall)
        result, dense = online(x, numbers, certify=certify, bound=True), oracle(x)
        got = achieved(oracle(x, result.kept).lse, dense).nan_to_num(nan=1.0)
        eps = ledger_rounding(dense, case.kv_len)
        assert torch.all(got >= result.row_recall - eps)
        tiles = (by_query_tile(rows) for rows in (result.row_recall, got, eps))
        for ledger, found, slack in zip(*tiles, strict=True):
            for rows in (ledger, found):
                least = rows.mean(-1) if certify == "mean" else rows.amin(-1)
                assert torch.all(least >= target(numbers) - slack.amax(-1))

    @given(case=cases(), recall=RECALLS, variant=certified)
    def test_in_float32_too(self, case: Case, recall: float, variant: str) -> None:
        x, numbers = case.make(torch.float32), control(recall)
        result, dense = run(variant, x, numbers), oracle(x)
        got = achieved(result.lse, dense).nan_to_num(nan=1.0)
        eps = 2 * dense.rounding.amax() + dense.lse.nan_to_num(neginf=0.0).abs().amax() * 2**-23
        for rows in by_query_tile(got):
            assert torch.all(rows.mean(-1) >= target(numbers) - eps)

    @given(case=cases(mask="none", **tiled), recall=RECALLS, variant=certified, seed=SEEDS)
    def test_holds_in_any_order_of_the_keys(
        self, case: Case, recall: float, variant: str, seed: int
    ) -> None:
        x, numbers = case.make(), control(recall)
        order = torch.randperm(case.kv_len, generator=torch.Generator().manual_seed(seed))
        moved = x.replace(k=x.k[:, :, order], v=x.v[:, :, order])
        result, dense = run(variant, moved, numbers), oracle(moved)
        got = achieved(result.lse, dense)
        eps = ledger_rounding(dense, case.kv_len)
        for rows, slack in zip(by_query_tile(got), by_query_tile(eps), strict=True):
            least = rows.mean(-1) if "mean" in variant else rows.amin(-1)
            assert torch.all(least >= target(numbers) - slack.amax(-1))

    @given(
        case=cases(**tiled),
        recall=RECALLS,
        variant=certified,
        log2=st.floats(-16, 0, width=32),
    )
    def test_holds_beside_a_given_threshold(
        self, case: Case, recall: float, variant: str, log2: float
    ) -> None:
        x, numbers = case.make(), control(recall, log2=log2)
        result, dense = run(variant, x, numbers), oracle(x)
        got = achieved(result.lse, dense).nan_to_num(nan=1.0)
        eps = ledger_rounding(dense, case.kv_len).amax()
        for rows in by_query_tile(got):
            assert torch.all(rows.mean(-1) >= target(numbers) - eps)

    @given(
        case=cases(**tiled),
        recall=RECALLS,
        rule=st.sampled_from(["lse", "max"]),
        certify=st.sampled_from(["mean", "row"]),
    )
    def test_holds_for_the_rules_of_the_literature(
        self, case: Case, recall: float, rule: str, certify: str
    ) -> None:
        x, numbers = case.make(), control(recall, threshold=0.9)
        result, dense = online(x, numbers, rule=rule, certify=certify), oracle(x)
        got = achieved(result.lse, dense).nan_to_num(nan=1.0)
        eps = ledger_rounding(dense, case.kv_len).amax()
        for rows in by_query_tile(got):
            least = rows.mean(-1) if certify == "mean" else rows.amin(-1)
            assert torch.all(least >= target(numbers) - eps)

    @pytest.mark.parametrize("variant", CERTIFIED)
    @pytest.mark.parametrize("family", ["spiky", "banded"])
    def test_drops_what_the_budget_allows(self, variant: str, family: str) -> None:
        x = Case(q_len=577, kv_len=577, family=family, seed=1).make()
        densities = [
            run(variant, x, control(r)).measures[c.MEASURE_DENSITY].item()
            for r in (0.5, 0.9, 0.99, 1.0)
        ]
        assert densities == sorted(densities)
        assert densities[0] < 0.9
        assert densities[-1] == 1


class TestLedger:
    @given(case=cases(), recall=RECALLS, variant=st.sampled_from(online_variants))
    def test_is_exact_or_a_lower_bound(self, case: Case, recall: float, variant: str) -> None:
        x = case.make()
        result, dense = run(variant, x, control(recall)), oracle(x)
        got, some = achieved(result.lse, dense), dense.lse != -torch.inf
        eps = ledger_rounding(dense, case.kv_len)
        assert torch.all(result.row_recall[~some] == 1)
        difference = (got - result.row_recall)[some]
        assert torch.all(difference >= -eps[some])
        if "bound" not in variant:
            assert torch.all(difference <= eps[some])
        mean = result.row_recall[some].mean().item() if some.any() else 1.0
        assert result.measures[c.MEASURE_ESTIMATE].item() == pytest.approx(mean, rel=1e-6)
        if "bound" in variant:
            assert result.measures[c.MEASURE_RECALL].isnan()
        else:
            assert result.measures[c.MEASURE_RECALL].item() == pytest.approx(mean, rel=1e-6)
            assert result.measures[c.MEASURE_STDERR] == 0
        assert torch.all(result.histogram == 0)

    def test_bound_is_not_the_exact_energy(self) -> None:
        x = Case(q_len=577, kv_len=576, seed=1).make()  # a tile of one key would be exact
        x.q.mul_(0.2)
        result, dense = run("online row bound", x, control(0.3)), oracle(x)
        got = achieved(result.lse, dense)
        dropped = got < 1 - 1e-9
        assert dropped.any()
        assert torch.all(result.row_recall[dropped] < got[dropped])


class TestOrder:
    @given(case=cases(mask="none", **tiled), recall=RECALLS, seed=SEEDS)
    def test_order_of_keys_inside_a_tile_does_not_matter(
        self, case: Case, recall: float, seed: int
    ) -> None:
        x = case.make()
        draw = torch.Generator().manual_seed(seed)
        order = torch.cat(
            [
                s + torch.randperm(min(c.BLOCK_N, case.kv_len - s), generator=draw)
                for s in range(0, case.kv_len, c.BLOCK_N)
            ]
        )
        moved = x.replace(k=x.k[:, :, order], v=x.v[:, :, order])
        for certify in ("mean", "row"):
            numbers = control(recall)
            assume(naive(x, numbers, "share", certify).margin > 1e-8)
            a, b = (online(y, numbers, certify=certify) for y in (x, moved))
            assert torch.equal(a.kept, b.kept)
            slack = 2 * oracle(x).rounding[..., None] * x.v.abs().amax()
            assert torch.all((a.out - b.out).abs() <= slack)

    @given(case=cases(**tiled), recall=RECALLS, seed=SEEDS)
    def test_one_vector_added_to_all_keys_does_not_matter(
        self, case: Case, recall: float, seed: int
    ) -> None:
        x, numbers = case.make(), control(recall)
        draw = torch.Generator().manual_seed(seed)
        moved = x.replace(k=x.k + torch.randn(case.head_dim, generator=draw, dtype=torch.float64))
        assume(naive(x, numbers, "share", "mean").margin > 1e-8)
        a, b = online(x, numbers), online(moved, numbers)
        assert torch.equal(a.kept, b.kept)
        slack = (oracle(x).rounding + oracle(moved).rounding)[..., None] * x.v.abs().amax()
        assert torch.all((a.out - b.out).abs() <= slack)

    def test_starts_at_the_diagonal(self) -> None:
        cpu = torch.device("cpu")
        assert ref.first_tile(3, 5, True, cpu).tolist() == [0, 2, 4]
        assert ref.first_tile(3, 6, True, cpu).tolist() == [0, 2, 4]
        assert ref.first_tile(2, 2, True, cpu).tolist() == [0, 1]  # 129 rows and 65 keys' tiles
        assert ref.first_tile(4, 2, False, cpu).tolist() == [0, 0, 1, 1]
        assert ref.first_tile(2, 9, False, cpu).tolist() == [0, 4]
        assert ref.first_tile(3, 0, False, cpu).tolist() == [0, 0, 0]
        assert ref.first_tile(0, 3, False, cpu).tolist() == []

    @given(n_m=st.integers(1, 300), n_n=st.integers(1, 600), same=st.booleans())
    def test_first_tile_exists(self, n_m: int, n_n: int, same: bool) -> None:
        first = ref.first_tile(n_m, n_n, same, torch.device("cpu"))
        assert torch.all((first >= 0) & (first < n_n))
        assert torch.all(first.diff() >= 0)

    def test_first_tile_is_always_kept(self) -> None:
        x = Case(q_len=577, kv_len=577, seed=1).make()
        for rule in ("share", "lse", "max"):
            result = online(x, control(0.01, threshold=1.0), rule=rule, certify="none")
            first = ref.first_tile(5, 10, True, torch.device("cpu"))
            assert torch.all(result.kept[0, 0, torch.arange(5), first])

    def test_a_row_that_has_met_nothing_keeps_its_tile(self) -> None:
        # The first tiles are hidden: the first one that is seen has nothing to be compared with.
        x = Case(batch=2, q_len=129, kv_len=577, seed=1).make()
        mask = torch.ones(2, 577, dtype=torch.bool)
        mask[1, :320] = False
        for variant in online_variants:
            result = run(variant, x.replace(mask=mask), control(0.05, threshold=1.0))
            assert torch.all(result.kept.any(-1))
            assert not result.kept[1, :, :, :5].any()
            assert torch.isfinite(result.out).all()


@dataclass(frozen=True)
class Naive:
    """Tiles kept by a plain loop, and how close its closest decision was."""

    kept: Tensor
    margin: float


def naive(x: Inputs, numbers: Tensor, rule: str, certify: str, bound: bool = False) -> Naive:
    """The rules as they are written down, one query tile and one key tile after the other."""
    scores = oracle(x).scores
    batch, heads, q_len, kv_len = scores.shape
    n_m, n_n = c.tiles(q_len, c.BLOCK_M), c.tiles(kv_len, c.BLOCK_N)
    recall = target(numbers)
    even = (1 - recall) * c.BLOCK_N / kv_len
    if bool(numbers[c.CONTROL_FIXED]):
        tau = 2.0 ** numbers[c.CONTROL_LOG2_THRESHOLD].item()
    else:
        tau = math.inf if rule == "share" and certify != "none" else even
    rho = (1 - recall) / recall
    kept = torch.zeros(batch, heads, n_m, n_n, dtype=torch.bool)
    margin = math.inf

    def below(a: Tensor, b: Tensor | float) -> Tensor:
        """A < b, and how far from equal, on a relative scale."""
        nonlocal margin
        b = torch.as_tensor(b, dtype=torch.float64).expand_as(a)
        size = torch.maximum(a.abs(), b.abs())
        gap = torch.where(size > 0, (a - b).abs() / size, 0)
        gap = gap[torch.isfinite(gap)]
        margin = min(margin, gap.min().item()) if gap.numel() else margin
        return a < b

    for b in range(batch):
        for h in range(heads):
            for t in range(n_m):
                rows = scores[b, h, t * c.BLOCK_M : (t + 1) * c.BLOCK_M]
                anchor = rows.amax(-1, keepdim=True)
                if torch.all(anchor == -torch.inf):
                    continue
                weights = (rows - anchor).exp()  # exact: the true maximum is known here
                tiles = weights.split(c.BLOCK_N, -1)
                seen = [j for j, tile in enumerate(tiles) if tile.any()]
                if q_len == kv_len:
                    first = min(t * c.BLOCK_M // c.BLOCK_N, n_n - 1)
                else:
                    first = t * n_n // n_m
                seen.sort(key=lambda j, first=first: (j - first) % n_n)
                have, lost = torch.zeros(len(rows)).double(), torch.zeros(len(rows)).double()
                top = torch.zeros(len(rows)).double()
                for done, j in enumerate(seen):
                    energy, peak = tiles[j].sum(-1), tiles[j].amax(-1)
                    if bound:
                        judged = peak * (rows[0].split(c.BLOCK_N)[j] != -torch.inf).sum()
                    else:
                        judged = energy
                    if done == 0 or recall == 1:
                        drop = False
                    elif rule == "share":
                        drop = bool(below(judged, tau * (have + lost)).all())
                    elif rule == "lse":  # tile maximum - running LSE < ln lambda, for all rows
                        drop = bool(below(peak.log() - have.log(), math.log(tau)).all())
                    else:  # tile maximum - running maximum < ln lambda, for all rows
                        drop = bool(below(peak.log() - top.log(), math.log(tau)).all())
                    if drop and certify != "none":
                        spent, cost = lost / have, judged / have
                        if certify == "mean":
                            spent, cost = spent.mean()[None], cost.mean()[None]
                        part = 4 * (rho - spent) / (len(seen) - done)
                        fits = below(spent + cost, rho) & below(cost, part)
                        drop = bool(fits.all())
                    top = torch.maximum(top, peak)
                    have, lost = (have, lost + judged) if drop else (have + energy, lost)
                    kept[b, h, t, j] = not drop
    return Naive(kept, margin)


class TestRules:
    # Peaks underflow against the true maximum in very spiky data, where logs are compared.
    data = cases(
        q_len=st.sampled_from([1, 129, 577]),
        kv_len=st.just(577),
        family=st.sampled_from(["gaussian", "spiky", "banded", "integers"]),
    )

    @given(case=data, recall=RECALLS, given_=st.none() | st.floats(-12, 0, width=32))
    @pytest.mark.parametrize(
        ("rule", "certify", "bound"),
        [
            ("share", "none", False),
            ("share", "mean", False),
            ("share", "row", False),
            ("lse", "none", False),
            ("max", "none", False),
            ("lse", "mean", False),
            ("max", "row", False),
            ("share", "none", True),
            ("share", "mean", True),
            ("share", "row", True),
            ("max", "none", True),
        ],
    )
    def test_drops_what_the_definition_says(
        self,
        case: Case,
        recall: float,
        given_: float | None,
        rule: str,
        certify: str,
        bound: bool,
    ) -> None:
        x = case.make()
        numbers = control(recall, log2=given_)
        wanted = naive(x, numbers, rule, certify, bound)
        assume(wanted.margin > 1e-6)  # the threshold itself is rounded to float32
        result = online(x, numbers, rule=rule, certify=certify, bound=bound)
        assert torch.equal(result.kept, wanted.kept)

    @pytest.mark.parametrize("rule", ["share", "lse", "max"])
    def test_each_rule_drops_and_keeps_here(self, rule: str) -> None:
        x = Case(q_len=577, kv_len=577, family="banded", head_dim=8, seed=1).make()
        numbers = control(0.9, threshold=0.02)
        kept = online(x, numbers, rule=rule, certify="none").kept
        assert 0.1 < kept.float().mean() < 0.9
        assert torch.equal(kept, naive(x, numbers, rule, "none").kept)

    @pytest.mark.parametrize("rule", ["share", "lse", "max"])
    def test_threshold_of_its_own(self, rule: str) -> None:
        x = Case(q_len=129, kv_len=577, family="banded").make()
        own = online(x, control(0.9), rule=rule, certify="none")
        even = float((1 - torch.tensor(0.9)) * (c.BLOCK_N / 577))
        assert own.measures[c.MEASURE_LOG2_THRESHOLD].item() == pytest.approx(math.log2(even))
        same = online(x, control(0.9, threshold=even), rule=rule, certify="none")
        assert torch.equal(own.kept, same.kept)

    def test_a_certificate_alone_has_no_threshold(self) -> None:
        result = online(Case().make(), control(0.9), certify="mean")
        assert result.measures[c.MEASURE_LOG2_THRESHOLD].isnan()


class TestRecallOne:
    @given(case=cases(), log2=st.floats(-16, 0, width=32))
    def test_the_filter_is_off(self, case: Case, log2: float) -> None:
        # At recall 1 a threshold changes nothing, bit for bit, nor does any rule.
        x = case.make(torch.float32)
        plain = online(x, control(1.0))
        for variant in online_variants:
            other = run(variant, x, control(1.0, log2=log2))
            assert torch.equal(plain.kept, other.kept)
            assert same_bits(plain.out, other.out)
            assert same_bits(plain.lse, other.lse)
        some = plain.lse != -torch.inf
        assert torch.all(plain.row_recall[some] == 1)


class TestWork:
    @pytest.mark.parametrize("variant", online_variants)
    def test_value_products_are_those_of_the_kept_tiles(self, variant: str) -> None:
        x = Case(kv_heads=2, q_len=256, kv_len=576, family="spiky", seed=8).make(torch.float32)
        with FlopCounterMode(display=False) as counter:
            result = run(variant, x, control(0.6))
        pairs = 2 * 256 * 576
        kept = int(by_element(result.kept, 256, 576).sum())
        assert kept < pairs
        assert counter.get_total_flops() == 2 * (pairs * 8 + kept * 8)
