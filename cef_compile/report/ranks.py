"""The audits of several processes as one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from cef_compile.ops import pooled
from cef_compile.report.audit import Audit, Call
from cef_compile.report.table import number, text_table


class GatheredAudit(Audit):
    """What a model delivered that runs on several ranks; see :func:`gather_audit`.

    Attributes:
        ranks: the audit of each rank, of its part of every node.

    Args:
        ranks: by global rank.

    Raises:
        ValueError: the ranks have not run the same passes, or a node in another number of calls.
    """

    def __init__(self, ranks: Mapping[int, Audit]) -> None:
        super().__init__()
        self.ranks = dict(ranks)
        calls: dict[tuple[Hashable, str, int], dict[int, list[Call]]] = {}
        for rank, audit in self.ranks.items():
            if audit._calls and self._passes and audit.passes != self.passes:
                raise ValueError(
                    f"the ranks have run different passes: {len(audit.passes)} on rank {rank},"
                    f" {len(self._passes)} before it, or with other labels"
                )
            if audit._calls:
                self._passes = [(p.model, p.step, p.branch) for p in audit.passes]
            for (model, path, ordinal), found in audit._calls.items():
                calls.setdefault((str(model), path, ordinal), {})[rank] = found
        self._calls = {key: self._pool(key, parts) for key, parts in calls.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "ranks": self.ranks}

    def __str__(self) -> str:
        """The table of the whole, and the recall of each rank's part."""
        recalls: list[dict[tuple[Hashable, str, int], float]] = [
            dict(zip(audit._calls, (node.recall for node in audit.nodes), strict=True))
            for audit in self.ranks.values()
        ]
        rows = [
            [f"{path or '(unnamed)'}#{ordinal}"]
            + [number(of_rank.get((model, path, ordinal))) for of_rank in recalls]
            for model, path, ordinal in self._calls
        ]
        if not rows:
            return super().__str__()
        table = text_table(["recall of", *(f"rank {rank}" for rank in self.ranks)], rows)
        return f"{super().__str__()}\n\n{table}"

    @staticmethod
    def _pool(key: tuple[Hashable, str, int], parts: Mapping[int, list[Call]]) -> list[Call]:
        counts = {rank: len(calls) for rank, calls in parts.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"node {key[1]}#{key[2]} was called {counts} times, by rank")
        pooled_calls = []
        for same in zip(*parts.values(), strict=True):
            measures = pooled([c.measures.cpu() for c in same], [c.node.rows for c in same])
            pooled_calls.append(replace(same[0], measures=measures))
        return pooled_calls
