"""Decisions on the nodes of one model, as they were calibrated or frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cef_compile.policy.bands import Bands, compiled_decision
from cef_compile.policy.builtin import Rules
from cef_compile.policy.calibration import Calibration
from cef_compile.policy.decision import Decision
from cef_compile.policy.node import AttentionNode, Reason

SHOWN = 3
"""So many nodes are named in a warning."""


@dataclass(frozen=True)
class NodeEntry:
    """The decisions on one node, and the sizes that they were made for.

    Attributes:
        path, ordinal: which node.
        q_shape, k_shape: (batch, heads, length, head_dim) when it was made.
        dtype: of the computation then, as "bfloat16".
        bands: decisions by noise level, ascending, the first from 0; only one without a schedule.
    """

    path: str
    ordinal: int
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    dtype: str
    bands: Bands

    @property
    def key(self) -> tuple[str, int]:
        """What identifies the node in its model."""
        return (self.path, self.ordinal)

    @property
    def filtered(self) -> bool:
        """Whether any noise level filters it."""
        return not compiled_decision(self.bands).is_dense

    def __str__(self) -> str:
        return f"{self.path or '(unnamed)'}#{self.ordinal}"


@dataclass(frozen=True)
class Calls:
    """The decisions on the calls under one path."""

    entries: tuple[NodeEntry, ...]

    def decide(self, node: AttentionNode) -> Decision:
        """The decision on the call with the node's ordinal."""
        return compiled_decision(self.noise_bands(node))

    def noise_bands(self, node: AttentionNode) -> Bands:
        """The same by noise level."""
        for entry in self.entries:
            if entry.ordinal == node.ordinal:
                return entry.bands
        return ((0.0, Decision.dense(Reason.POLICY, "the policy knows no such call")),)


class NodePolicy(Rules):
    """Rules by exact path, made for one model: a calibrated policy, or a frozen one.

    A node that it does not know stays dense. A backend warns where it is used on another model
    class, other nodes, or other sizes than it was made for.

    Args:
        model: class of the model.
        nodes: the nodes; no two alike.
        calibration: what was measured, for a calibrated policy.

    Raises:
        ValueError: there are no nodes, one is given twice, or its bands contradict each other.
    """

    def __init__(
        self, model: str, nodes: Sequence[NodeEntry], calibration: Calibration | None = None
    ) -> None:
        by_path: dict[str, list[NodeEntry]] = {}
        for entry in nodes:
            check_entry(entry)
            if entry.key in {other.key for other in by_path.get(entry.path, [])}:
                raise ValueError(f"node {entry} is given twice")
            by_path.setdefault(entry.path, []).append(entry)
        if not by_path:
            raise ValueError(f"a policy for the nodes of {model} needs at least one node")
        super().__init__({path: Calls(tuple(entries)) for path, entries in by_path.items()})
        self.model = model
        self.nodes = tuple(nodes)
        self.calibration = calibration

    def __repr__(self) -> str:
        filtered = sum(entry.filtered for entry in self.nodes)
        kind = "" if self.calibration is None else f", max_error={self.calibration.max_error:g}"
        return f"NodePolicy({self.model}, {filtered} of {len(self.nodes)} nodes filtered{kind})"

    def differences(
        self, model: str, nodes: Sequence[AttentionNode], complete: bool
    ) -> dict[str, str]:
        """How a model differs from the one that the policy was made for, by kind of difference.

        Args:
            model: its class.
            nodes: those of its nodes that are known, with concrete sizes.
            complete: whether that is all of them, so that missing ones are missing.
        """
        found = {}
        if model != self.model:
            found["model"] = f"it was made for {self.model}, and this is {model}"
        mine = {entry.key: entry for entry in self.nodes}
        theirs = {node.key: node for node in nodes}
        unknown = [f"{path or '(unnamed)'}#{i}" for path, i in theirs if (path, i) not in mine]
        if unknown:
            found["unknown"] = f"it does not know {_some(unknown)}, dense for that reason"
        missing = [str(entry) for key, entry in mine.items() if key not in theirs]
        if missing and complete:
            found["missing"] = f"it has decisions on {_some(missing)}, which the model lacks"
        pairs = [
            (entry, theirs[key]) for key, entry in mine.items() if entry.filtered and key in theirs
        ]
        sizes = [
            f"{entry} (made for {entry.q_shape[-2]} x {entry.k_shape[-2]}, now"
            f" {node.q_len} x {node.kv_len})"
            for entry, node in pairs
            if not _is_part(node, entry)
        ]
        if sizes:
            found["size"] = f"queries x keys are others in {_some(sizes)}"
        dtypes = [
            f"{entry} (made for {entry.dtype}, now {dtype_name(node)})"
            for entry, node in pairs
            if entry.dtype != dtype_name(node)
        ]
        if dtypes:
            found["dtype"] = f"the dtype is another in {_some(dtypes)}"
        return found


def check_entry(entry: NodeEntry) -> NodeEntry:
    """``entry``, if its bands fit each other.

    Raises:
        ValueError: they do not.
    """
    levels = [level for level, _ in entry.bands]
    if not levels or levels[0] != 0 or levels != sorted(set(levels)):
        raise ValueError(f"the bands of node {entry} must begin at 0 and ascend, got {levels}")
    variants = {decision.variant for _, decision in entry.bands if not decision.is_dense}
    if len(variants) > 1:
        raise ValueError(
            f"the bands of node {entry} want different filters, and a compiled graph holds one:"
            f" {sorted(variants)}"
        )
    return entry


def _is_part(node: AttentionNode, entry: NodeEntry) -> bool:
    """Whether a node is the one of an entry, or what one of several ranks has of it.

    Ranks share out heads (Ulysses, tensor parallel) or queries (ring), and see all keys.
    """
    whole = (*entry.q_shape[1:3], entry.k_shape[1])
    part = (*node.q_shape[1:3], node.k_shape[1])
    divides = all(size and total % size == 0 for total, size in zip(whole, part, strict=True))
    return divides and entry.k_shape[2:] == node.k_shape[2:]


def dtype_name(node: AttentionNode) -> str:
    """The node's dtype as files spell it."""
    return str(node.dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
