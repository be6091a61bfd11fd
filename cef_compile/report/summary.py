"""The report of a backend: every attention node, what was decided and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cef_compile.report.table import number, text_table
from cef_compile.report.words import (
    bound_sentences,
    break_sentences,
    order_sentences,
    token_words,
)


@dataclass(frozen=True)
class ReportedNode:
    """One attention node.

    Attributes:
        model: class of the model, numbered where a backend serves several of that class.
        path, ordinal: which call it is.
        kind: "self", "cross" or "joint".
        q_shape, kv_shape: (batch, heads, length, head_dim); -1 where a size is not known.
        dtype, device: of the computation.
        mask: "none", "key_padding", "bool" or "float".
        decision: "filtered" or "dense".
        filter, rule, certify: how it is filtered; empty if dense.
        bound: whether its ledger holds bounds, so that ``estimated_recall`` is a lower bound.
        engine: what computed the last filtered call: "reference", "triton", "hopper", "hopper-int8"
            or "fa4"; empty before one, "sdpa" if dense.
        recall: wanted recall; None if dense. Of a group's nodes it is the mean that counts.
        group: name of the group that shares a threshold; None if the node has its own.
        reason, detail: why it is dense; empty if filtered.
        calls: filtered calls so far.
        density, estimated_recall, threshold: of the last filtered call; None before one.
        form: how the model writes it, see :class:`~cef_compile.AttentionNode`.
        order: in which its tiles are cut, "grid" or "raster"; empty if dense.
        grid, segments, grid_source: what its tokens are, see :class:`~cef_compile.AttentionNode`.
    """

    model: str
    path: str
    ordinal: int
    kind: str
    q_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]
    dtype: str
    device: str
    mask: str
    decision: str
    filter: str
    rule: str
    certify: str
    engine: str
    recall: float | None
    group: str | None
    reason: str
    detail: str
    calls: int
    density: float | None
    estimated_recall: float | None
    threshold: float | None
    form: str = "sdpa"
    order: str = ""
    grid: tuple[int, int, int] | None = None
    segments: tuple[int, ...] = ()
    grid_source: str = ""
    bound: bool = False

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.q_shape[-2]

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.kv_shape[-2]


@dataclass(frozen=True)
class ReportedBreak:
    """A place at which Dynamo could not go on with a model's graph.

    Attention on both sides of it is seen, in graphs of their own; what Dynamo leaves to Python
    between them is not.

    Attributes:
        model: as of :class:`ReportedNode`.
        place: file, line and function.
        reason: what Dynamo met there.
        remedy: what may keep the graph whole.
    """

    model: str
    place: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What a backend found in the graphs that it was given, what was decided, and why.

    Attributes:
        policy: the policy, as text.
        nodes: every attention node, in the order of the model.
        unmatched_rules: patterns of the policy that match no node.
        breaks: where the graphs of a model were broken, and what may keep them whole.
    """

    policy: str
    nodes: Sequence[ReportedNode]
    unmatched_rules: Sequence[str] = ()
    breaks: Sequence[ReportedBreak] = ()

    @property
    def filtered(self) -> list[ReportedNode]:
        """The nodes that are filtered."""
        return [node for node in self.nodes if node.decision == "filtered"]

    @property
    def dense(self) -> list[ReportedNode]:
        """The nodes that stay dense."""
        return [node for node in self.nodes if node.decision == "dense"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: ``policy``, ``nodes``, ``unmatched_rules``, ``breaks``."""
        nodes = [
            {**asdict(node), "q_len": node.q_len, "kv_len": node.kv_len} for node in self.nodes
        ]
        return {
            "policy": self.policy,
            "nodes": nodes,
            "unmatched_rules": list(self.unmatched_rules),
            "breaks": [asdict(found) for found in self.breaks],
        }

    def __str__(self) -> str:
        """A summary, the reasons, and a table with a line for each node."""
        breaks = break_sentences(self.to_dict()["breaks"])
        if not self.nodes:
            return "\n".join(["No attention node seen yet: run the compiled model once.", *breaks])
        lines = [
            f"{len(self.nodes)} attention nodes: {len(self.filtered)} filtered,"
            f" {len(self.dense)} dense. Policy: {self.policy}"
        ]
        lines += [
            f"  {count} dense: {reason}"
            for reason, count in Counter(node.reason for node in self.dense).most_common()
        ]
        nodes = self.to_dict()["nodes"]
        lines += [
            f"  {sentence}" for sentence in (*order_sentences(nodes), *bound_sentences(nodes))
        ]
        lines += [f"  rule {pattern!r} matches no node" for pattern in self.unmatched_rules]
        lines += [f"  {sentence}" for sentence in breaks]
        models = len({node.model for node in self.nodes}) > 1
        header = ["node", "kind", "form", "q x kv", "tokens", "decision", "engine"]
        header += ["recall", "estimate", "density", "why"]
        rows = [
            [
                f"{node.path or '(unnamed)'}#{node.ordinal}",
                node.kind,
                node.form,
                f"{node.q_len} x {node.kv_len}",
                token_words(asdict(node)),
                node.filter or "dense",
                node.engine,
                number(node.recall),
                _estimate(node),
                number(node.density),
                f"{node.reason} ({node.detail})" if node.detail else node.reason,
            ]
            for node in self.nodes
        ]
        if models:
            header.insert(0, "model")
            rows = [[node.model, *row] for node, row in zip(self.nodes, rows, strict=True)]
        return "\n".join([*lines, "", text_table(header, rows)])


def _estimate(node: ReportedNode) -> str:
    text = number(node.estimated_recall)
    return f">= {text}" if text and node.bound else text
