"""The audit: recall as it was delivered, from exact energies of a sample of query tiles."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cef_compile.ops import Measures
from cef_compile.policy import AttentionNode, Decision
from cef_compile.report.table import number, text_table

Z_95 = 1.959963984540054
"""Half width of a 95 % interval in standard errors."""


@dataclass(frozen=True)
class AuditedNode:
    """One node over the calls of an audit.

    Attributes:
        model, path, ordinal: which node.
        target: the recall that was wanted of the node, or of its group on average.
        recall: achieved recall, mean over the calls.
        interval: its 95 % interval.
        estimate: recall by the filter's own account, mean over the calls.
        density: kept tiles / visible tiles, mean over the calls.
        threshold: share at which a tile was kept in the last call; None where the rule has none.
        calls: number of calls.
        recalls, densities: of each call.
    """

    model: str
    path: str
    ordinal: int
    target: float
    recall: float
    interval: tuple[float, float]
    estimate: float
    density: float
    threshold: float | None
    calls: int
    recalls: tuple[float, ...]
    densities: tuple[float, ...]


class Audit:
    """Collects what filtered calls delivered while it is on; made by ``backend.audit()``."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str, int], list[tuple[Decision, Tensor]]] = {}

    def add(self, model: str, node: AttentionNode, decision: Decision, measures: Tensor) -> None:
        """One call of one node; ``measures`` stays on its device until it is read."""
        self._calls.setdefault((model, *node.key), []).append((decision, measures))

    @property
    def nodes(self) -> list[AuditedNode]:
        """The audited nodes, in the order in which they ran. Synchronises with the device."""
        return [self._summarise(key, calls) for key, calls in self._calls.items()]

    @property
    def recall(self) -> float:
        """Recall of the model: mean over its nodes; NaN where nothing was audited."""
        nodes = self.nodes
        return math.fsum(node.recall for node in nodes) / len(nodes) if nodes else math.nan

    @property
    def density(self) -> float:
        """Density of the model: mean over its nodes; NaN where nothing was audited."""
        nodes = self.nodes
        return math.fsum(node.density for node in nodes) / len(nodes) if nodes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: ``recall``, ``density`` and ``nodes``."""
        nodes = self.nodes
        count = len(nodes) or math.nan
        return {
            "recall": math.fsum(node.recall for node in nodes) / count,
            "density": math.fsum(node.density for node in nodes) / count,
            "nodes": [asdict(node) for node in nodes],
        }

    def __str__(self) -> str:
        """A table with a line for each node."""
        nodes = self.nodes
        if not nodes:
            return "Nothing audited: no filtered node ran inside the with-block."
        rows = [
            [
                f"{node.path or '(unnamed)'}#{node.ordinal}",
                number(node.target),
                number(node.recall),
                f"{node.interval[0]:.3f} .. {node.interval[1]:.3f}",
                number(node.density),
                str(node.calls),
            ]
            for node in nodes
        ]
        header = ["node", "target", "recall", "95 % interval", "density", "calls"]
        return (
            f"{text_table(header, rows)}\nmean recall {self.recall:.4f}, density {self.density:.4f}"
        )

    def _summarise(
        self, key: tuple[str, str, int], calls: list[tuple[Decision, Tensor]]
    ) -> AuditedNode:
        model, path, ordinal = key
        stacked = torch.stack([measures for _, measures in calls]).cpu()
        read = [Measures.of(row) for row in stacked]
        count = len(read)
        recall = math.fsum(m.recall for m in read) / count
        half = Z_95 * math.sqrt(math.fsum(m.stderr**2 for m in read)) / count
        target = calls[-1][0].recall
        assert target is not None, "only filtered nodes are audited"
        threshold = read[-1].threshold
        return AuditedNode(
            model=model,
            path=path,
            ordinal=ordinal,
            target=target,
            recall=recall,
            interval=(max(recall - half, 0.0), min(recall + half, 1.0)),
            estimate=math.fsum(m.estimate for m in read) / count,
            density=math.fsum(m.density for m in read) / count,
            threshold=None if math.isnan(threshold) else threshold,
            calls=count,
            recalls=tuple(m.recall for m in read),
            densities=tuple(m.density for m in read),
        )
