"""The audit: recall and error as they were delivered, from exact attention of a sample."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cef_compile.ops import Measures, interval_95
from cef_compile.policy import AttentionNode, Decision
from cef_compile.report.record import MEANS
from cef_compile.report.table import ERROR_DIGITS, number, span, text_table


@dataclass(frozen=True)
class AuditedNode:
    """One node over the calls of an audit.

    Attributes:
        model, path, ordinal: which node.
        target: the recall that was wanted of the node, or of its group on average.
        recall: achieved recall, mean over the calls.
        interval: its 95 % interval.
        error: relative error of the attention output against exact attention,
            ``||out - exact|| / ||exact||`` over the sampled rows, mean over the calls.
        error_interval: its 95 % interval.
        estimate: recall by the filter's own account, mean over the calls; a lower bound where the
            filter bounds energies.
        density: kept tiles / visible tiles, mean over the calls.
        threshold: share at which a tile was kept in the last call; None where the rule has none.
        calls: number of calls.
        recalls, densities, errors: of each call.
        stderrs, error_stderrs: standard error of each call's recall and error; 0 where every query
            tile was looked at.
        passes: which forward pass each call belongs to, an index into :attr:`Audit.passes`.
    """

    model: str
    path: str
    ordinal: int
    target: float
    recall: float
    interval: tuple[float, float]
    error: float
    error_interval: tuple[float, float]
    estimate: float
    density: float
    threshold: float | None
    calls: int
    recalls: tuple[float, ...]
    densities: tuple[float, ...]
    stderrs: tuple[float, ...]
    errors: tuple[float, ...]
    error_stderrs: tuple[float, ...]
    passes: tuple[int, ...]


@dataclass(frozen=True)
class AuditedPass:
    """One forward pass of one model.

    Attributes:
        model: which model.
        step: the label that was set with :meth:`Audit.label`, or how many passes of the model
            came before this one.
        branch: the label of a branch, for instance of classifier-free guidance; "" where none was
            set.
    """

    model: str
    step: str
    branch: str


@dataclass(frozen=True)
class Call:
    """A call of a node as it is kept until somebody reads it."""

    node: AttentionNode
    decision: Decision
    measures: Tensor
    pass_: int


@dataclass
class _Progress:
    """Where a model is: its pass under way, and the nodes that have run in it."""

    passes: int = 0
    current: int = -1
    ran: set[tuple[str, int]] = field(default_factory=set)


class Audit:
    """Collects what filtered calls delivered while it is on; made by ``backend.audit()``.

    Calls are grouped by forward pass: one ends when a node of the model runs again, or when the
    label changes. Passes in which nothing was filtered are not seen, so a generation whose first
    steps are dense is counted from its first filtered one, unless its steps are labelled.
    """

    def __init__(self) -> None:
        # Models as they are, not by name: one gets a number when a second of its class turns up.
        self._calls: dict[tuple[Hashable, str, int], list[Call]] = {}
        self._passes: list[tuple[Hashable, str, str]] = []
        self._progress: dict[Hashable, _Progress] = {}
        self._label: tuple[str, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: the calls so far, read, under the models' names."""
        read = {
            (str(model), *key): [replace(call, measures=call.measures.cpu()) for call in calls]
            for (model, *key), calls in self._calls.items()
        }
        passes = [(str(model), step, branch) for model, step, branch in self._passes]
        return {**vars(Audit()), "_calls": read, "_passes": passes}

    def label(self, step: object, branch: object = "") -> None:
        """Name the coming forward passes, for reports.

        Args:
            step: for instance the number of the step, or its noise level.
            branch: for instance "text" and "no text" under classifier-free guidance.
        """
        label = (str(step), str(branch))
        if label != self._label:
            self._label = label
            for progress in self._progress.values():
                progress.ran.clear()
                progress.current = -1

    def add(
        self, model: Hashable, node: AttentionNode, decision: Decision, measures: Tensor
    ) -> None:
        """One call of one node.

        Args:
            model: whose ``str()`` names the model.
            node, decision: which node, and what was wanted of it.
            measures: the op's; stays on its device until it is read.
        """
        progress = self._progress.setdefault(model, _Progress())
        if progress.current < 0 or node.key in progress.ran:
            step, branch = self._label or (str(progress.passes), "")
            progress.current = len(self._passes)
            progress.passes += 1
            progress.ran.clear()
            self._passes.append((model, step, branch))
        progress.ran.add(node.key)
        call = Call(node, decision, measures, progress.current)
        self._calls.setdefault((model, *node.key), []).append(call)

    @property
    def passes(self) -> list[AuditedPass]:
        """The forward passes in which something was audited, in the order in which they ran."""
        return [AuditedPass(str(model), step, branch) for model, step, branch in self._passes]

    @property
    def nodes(self) -> list[AuditedNode]:
        """The audited nodes, in the order in which they ran. Synchronises with the device."""
        return [self._summarise(key, calls) for key, calls in self._calls.items()]

    @property
    def recall(self) -> float:
        """Recall of the model: mean over its nodes; NaN where nothing was audited."""
        return _mean([node.recall for node in self.nodes])

    @property
    def error(self) -> float:
        """Relative error of the attention output: mean over the nodes; NaN as for recall."""
        return _mean([node.error for node in self.nodes])

    @property
    def density(self) -> float:
        """Density of the model: mean over its nodes; NaN where nothing was audited."""
        return _mean([node.density for node in self.nodes])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: ``recall``, ``error``, ``density``, ``passes``, ``nodes``."""
        nodes = self.nodes
        return {
            **{name: _mean([getattr(node, name) for node in nodes]) for name in MEANS},
            "passes": [asdict(pass_) for pass_ in self.passes],
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
                span(node.interval),
                number(node.error, ERROR_DIGITS),
                span(node.error_interval, ERROR_DIGITS),
                number(node.density),
                str(node.calls),
            ]
            for node in nodes
        ]
        header = ["node", "target", "recall", "95 % interval", "error", "95 % interval"]
        header += ["density", "calls"]
        means = {name: _mean([getattr(node, name) for node in nodes]) for name in MEANS}
        mean = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        return f"{text_table(header, rows)}\nmean {mean}"

    def _summarise(self, key: tuple[Hashable, str, int], calls: list[Call]) -> AuditedNode:
        model, path, ordinal = key
        stacked = torch.stack([call.measures for call in calls]).cpu()
        read = [Measures.of(row) for row in stacked]
        target = calls[-1].decision.recall
        assert target is not None, "only filtered nodes are audited"
        threshold = read[-1].threshold
        recall, error = (_mean([getattr(m, name) for m in read]) for name in ("recall", "error"))
        return AuditedNode(
            model=str(model),
            path=path,
            ordinal=ordinal,
            target=target,
            recall=recall,
            interval=interval_95(recall, _stderr([m.stderr for m in read])),
            error=error,
            error_interval=interval_95(error, _stderr([m.error_stderr for m in read]), math.inf),
            estimate=_mean([m.estimate for m in read]),
            density=_mean([m.density for m in read]),
            threshold=None if math.isnan(threshold) else threshold,
            calls=len(read),
            recalls=tuple(m.recall for m in read),
            densities=tuple(m.density for m in read),
            stderrs=tuple(m.stderr for m in read),
            errors=tuple(m.error for m in read),
            error_stderrs=tuple(m.error_stderr for m in read),
            passes=tuple(call.pass_ for call in calls),
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _stderr(values: Sequence[float]) -> float:
    """Of the mean of independent samples with these standard errors."""
    return math.sqrt(math.fsum(value**2 for value in values)) / len(values)
