"""Audits of several ranks as one: without processes, from the parts that ranks would have."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Case, cases
from torch import Tensor

import cef_compile
from cef_compile import ops
from cef_compile.kernels import config as c
from cef_compile.kernels import reference as ref
from cef_compile.policy import AttentionNode, Decision
from cef_compile.report import Audit, GatheredAudit


def node(path: str = "attn", heads: int = 2) -> AttentionNode:
    shape = (1, heads, 256, 8)
    return AttentionNode(
        path, 0, shape, shape, shape, (), (), (), torch.float32, torch.device("cpu"),
        None, False, 0.0, False, "none", "self", False,
    )  # fmt: skip


def measures(recall: float = 0.9, stderr: float = 0.0, log2_threshold: float = -8.0) -> Tensor:
    values = torch.zeros(c.MEASURE_SIZE, dtype=torch.float64)
    values[c.MEASURE_RECALL], values[c.MEASURE_STDERR] = recall, stderr
    values[c.MEASURE_LOG2_THRESHOLD] = log2_threshold
    return values


def audit(*calls: tuple[str, Tensor], heads: int = 2) -> Audit:
    found = Audit()
    for path, measured in calls:
        found.add("Model", node(path, heads), Decision(0.9), measured)
    return found


@given(
    cases(batch=1, kv_heads=st.integers(2, 3), group=1, mask="none", q_len=st.just(200)),
    st.data(),
)
def test_parts_of_the_heads_pool_to_the_whole(case: Case, data: st.DataObject) -> None:
    """At one threshold, which is how ranks share it."""
    given = case.make()
    cut = data.draw(st.integers(1, case.heads - 1))
    control = ops.new_control(Decision(0.9, threshold=1 / 32), torch.device("cpu"))

    def filtered(heads: slice) -> Tensor:
        q, k, v = (t[:, heads] for t in (given.q, given.k, given.v))
        return ref.planned(q, k, v, control, scale=given.scale, audited=True).measures

    whole = filtered(slice(None))
    parts = [filtered(slice(None, cut)), filtered(slice(cut, None))]
    pooled = ops.pooled(parts, [cut, case.heads - cut])
    torch.testing.assert_close(pooled, whole.double(), rtol=1e-5, atol=1e-6)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1), st.floats(0, 0.1)), min_size=1))
def test_independent_parts(parts: list[tuple[int, float, float]]) -> None:
    """Mean and variance of a weighted sum of independent numbers."""
    rows = [n for n, _, _ in parts]
    pooled = ops.pooled([measures(recall, stderr) for _, recall, stderr in parts], rows)
    total = sum(rows)
    mean = sum(n * recall for n, recall, _ in parts) / total
    variance = sum((n / total * stderr) ** 2 for n, _, stderr in parts)
    assert pooled[c.MEASURE_RECALL].item() == pytest.approx(mean)
    assert pooled[c.MEASURE_STDERR].item() ** 2 == pytest.approx(variance, abs=1e-12)
    assert pooled[c.MEASURE_LOG2_THRESHOLD] == -8


def test_thresholds_that_differ_are_none() -> None:
    ranks = {rank: audit(("attn", measures(log2_threshold=-8.0 - rank))) for rank in range(2)}
    (pooled,) = GatheredAudit(ranks).nodes
    assert pooled.threshold is None


def test_ranks_weigh_by_their_rows_and_are_shown() -> None:
    ranks = {
        0: audit(("attn", measures(0.8)), ("attn", measures(0.9)), heads=3),
        5: audit(("attn", measures(0.6)), ("attn", measures(0.7)), heads=1),
    }
    gathered = pickle.loads(pickle.dumps(GatheredAudit(ranks)))
    (pooled,) = gathered.nodes
    assert pooled.recalls == pytest.approx((0.75, 0.85))
    assert gathered.passes == ranks[0].passes
    assert gathered.recall == pytest.approx(0.8)
    header, _, row = str(gathered).splitlines()[-3:]
    assert header.split() == ["recall", "of", "rank", "0", "rank", "5"]
    assert row.split() == ["attn#0", "0.850", "0.650"]


def test_a_rank_may_have_layers_of_its_own_or_none() -> None:
    ranks = {0: audit(("a", measures(0.8))), 1: audit(("b", measures(0.6))), 2: audit()}
    gathered = GatheredAudit(ranks)
    assert [(n.path, n.recall) for n in gathered.nodes] == [("a", 0.8), ("b", 0.6)]
    assert str(gathered).splitlines()[-2].split() == ["a#0", "0.800"]
    assert str(GatheredAudit({0: audit(), 1: audit()})).startswith("Nothing audited")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (audit(("attn", measures())), "different passes: 1 on rank 1, 2 before it"),
        (
            audit(("attn", measures()), ("b", measures()), ("b", measures())),
            r"attn#0 was called \{0: 2, 1: 1\} times",
        ),
    ],
)
def test_ranks_that_ran_other_calls(other: Audit, message: str) -> None:
    mine = audit(("attn", measures()), ("attn", measures()))
    with pytest.raises(ValueError, match=message):
        GatheredAudit({0: mine, 1: other})


def test_a_node_knows_its_rows() -> None:
    assert node(heads=3).rows == 3 * 256
    assert replace(node(), q_shape=(2, 3, 4, 8)).rows == 24


@pytest.mark.parametrize("group", [1, "world", object()])
def test_what_is_no_group(group: object) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.distributed process group"):
        cef_compile.backend(group=group)
