"""Run time: which layer a compiled graph is called for, its numbers, and the shared threshold.

A compiled graph may serve many layers and more than one model. Each call is told apart by its
anchor, a parameter among its inputs or the module that is running; the numbers of that layer's
nodes go in as inputs, and the histograms and measures that come out are kept for it. Nothing here
synchronises with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cef_compile import ops
from cef_compile.distributed import mean_over_ranks
from cef_compile.ops import Phase
from cef_compile.policy import AttentionNode, Bands, Decision, NodeEntry, band_at, dtype_name
from cef_compile.report import Audit, ReportedNode

FILL = Decision(1.0)
"""Stands in for the decision of a layer that is dense in a graph where others are filtered."""


@dataclass
class Switches:
    """What the user's with-blocks have switched on for the coming calls."""

    dense: int = 0
    audits: list[Audit] = field(default_factory=list)

    def phase(self, decision: Decision) -> Phase:
        """What a call does with a node."""
        if self.dense or decision.is_dense:
            return Phase.DENSE
        return Phase.AUDITED if self.audits else Phase.FILTERED


class NodeState:
    """One attention node of one model.

    Attributes:
        node: the node, with its path in the model and concrete sizes.
        decision: what is done with it, at the noise level that is set where there is a schedule.
        bands: its decisions by noise level; empty where no schedule changes them.
        waiting: whether there is a schedule and no noise level yet.
        variant: the filter compiled into its graph; None where it was compiled dense.
        calls: how often its graph ran with it filtered.
        control, histogram, measures: its numbers on the device, see :mod:`cef_compile.ops`.
    """

    def __init__(
        self,
        node: AttentionNode,
        decision: Decision,
        variant: tuple[Any, ...] | None,
        bands: Bands = (),
        level: float | None = None,
    ) -> None:
        self.node = node
        self.decision = decision
        self.variant = variant
        self.bands: Bands = ()
        self.waiting = False
        self._band = -1
        self._controls: list[Tensor] = []
        self._schedule(decision, bands, level)
        self.reset()

    def __str__(self) -> str:
        return f"{self.node.path or '(unnamed)'}#{self.node.ordinal}"

    def reset(self) -> None:
        """Forget what earlier calls have shown."""
        self.calls = 0
        if self.variant is None:
            return
        # Tensors made in inference mode could not be updated outside it later on.
        with torch.inference_mode(False):
            self.control = self._new_control(self.decision)
            self.histogram = self.control.new_zeros(2, ops.RANK_BINS)
            self.measures = self.control.new_zeros(ops.MEASURE_SIZE)

    def decide(self, decision: Decision, bands: Bands = (), level: float | None = None) -> None:
        """Take another decision, without another compilation; a node's history stays."""
        self._schedule(decision, bands, level)
        if self.variant is None:
            return
        fresh = self._new_control(self.decision)
        with torch.no_grad():
            self.control.copy_(fresh)

    def at_level(self, level: float | None) -> Tensor | None:
        """Take the decision of a noise level; returns its control if it is another one now.

        The controls of all bands are on the device already, so that nothing waits for it.
        """
        if not self.bands:
            return None
        self.waiting = level is None
        if level is None:
            return None
        band = band_at(self.bands, level)
        if band == self._band:
            return None
        self._band, self.decision = band, self.bands[band][1]
        return self._controls[band]

    def frozen(self) -> NodeEntry:
        """The node's decisions, with the threshold that its group shares fixed. Synchronises.

        Raises:
            RuntimeError: the group's threshold has not been found yet.
            ValueError: it is found anew at each level of a schedule.
        """
        bands = self.bands or ((0.0, self.decision),)
        if any(d.group is not None and d.threshold is None for _, d in bands):
            if len(bands) > 1:
                raise ValueError(
                    f"node {self} shares a threshold that each noise level finds anew, and one"
                    " policy cannot freeze them all; freeze one without a schedule"
                )
            threshold = ops.fixed_threshold(self.control) if self.variant else None
            if threshold is None:
                raise RuntimeError(
                    f"node {self} has not found its threshold yet: run the compiled model once"
                )
            bands = ((0.0, replace(self.decision, threshold=threshold)),)
        node = self.node
        return NodeEntry(
            node.path, node.ordinal, node.q_shape, node.k_shape, dtype_name(node), bands
        )

    def _schedule(self, decision: Decision, bands: Bands, level: float | None) -> None:
        self.decision, self.bands, self._band = decision, bands, -1
        self.waiting = bool(bands)
        with torch.inference_mode(False):
            self._controls = [self._new_control(banded) for _, banded in bands]
        self.at_level(level)

    def _new_control(self, decision: Decision) -> Tensor:
        return ops.new_control(FILL if decision.is_dense else decision, self.node.device)

    def reported(self, model: str) -> ReportedNode:
        """The node's line in a report. Synchronises with the device."""
        node, decision = self.node, self.decision
        last = ops.Measures.of(self.measures) if self.calls else None
        has_threshold = last is not None and not math.isnan(last.threshold)
        return ReportedNode(
            model=model,
            path=node.path,
            ordinal=node.ordinal,
            kind=node.kind,
            q_shape=node.q_shape,
            kv_shape=node.k_shape,
            dtype=str(node.dtype).removeprefix("torch."),
            device=str(node.device),
            mask=node.mask,
            decision="dense" if decision.is_dense else "filtered",
            filter="" if decision.is_dense else decision.filter,
            rule="" if decision.is_dense else decision.rule,
            certify="" if decision.is_dense else decision.certify,
            engine="sdpa" if decision.is_dense else ops.engine(self.measures) if self.calls else "",
            recall=decision.recall,
            group=decision.group,
            reason="" if decision.reason is None else str(decision.reason),
            detail=decision.detail,
            calls=self.calls,
            density=last.density if last else None,
            estimated_recall=last.estimate if last else None,
            threshold=last.threshold if last and has_threshold else None,
            form=node.form,
            order="" if decision.is_dense else decision.order,
            grid=node.grid,
            segments=node.segments,
            grid_source=node.grid_source,
            bound=decision.bound and not decision.is_dense,
        )


class ModelState:
    """The nodes of one model, and the forward pass that is under way.

    Args:
        name: class of the model, numbered where its backend serves several of that class.
        after_first_pass: called once, when every filtered node of the model is known.
        level: noise level that is set; None where none is.
        group: ranks that run the same passes and share thresholds; None for this process alone.

    A pass ends when a node is about to run for the second time. Then the nodes of each group that
    ran in it get the one threshold at which their mean recall is the target.
    """

    def __init__(
        self,
        name: str,
        after_first_pass: Callable[[], None],
        level: float | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.name = name
        self.level = level
        self._group = group
        self.nodes: list[NodeState] = []
        self._after_first_pass: Callable[[], None] | None = after_first_pass
        self._ran: dict[tuple[str, int], NodeState] = {}

    def __str__(self) -> str:
        return self.name

    def node(
        self,
        node: AttentionNode,
        decision: Decision,
        variant: tuple[Any, ...] | None,
        bands: Bands = (),
    ) -> NodeState:
        """The state of a node; the same one where a graph was compiled again for equal sizes."""
        for state in self.nodes:
            known = state.node
            same = known.key == node.key and state.variant == variant and known.grid == node.grid
            if same and known.q_shape == node.q_shape and known.k_shape == node.k_shape:
                return state
        self.nodes.append(NodeState(node, decision, variant, bands, self.level))
        return self.nodes[-1]

    @property
    def complete(self) -> bool:
        """Whether a whole pass has run, so that every filtered node is known."""
        return self._after_first_pass is None

    def set_level(self, level: float | None) -> None:
        """Take the decisions of a noise level. No host synchronisation."""
        self.level = level
        changes = [(state.control, state.at_level(level)) for state in self.nodes if state.bands]
        changed = [(control, fresh) for control, fresh in changes if fresh is not None]
        if changed:
            ops.set_controls([old for old, _ in changed], [fresh for _, fresh in changed])

    def end_pass(self) -> None:
        """The pass under way is over: find the thresholds that its histograms ask for."""
        if self._ran:
            self._end_pass()

    def frozen(self) -> list[NodeEntry]:
        """The nodes as the next pass would decide on them; see :meth:`NodeState.frozen`.

        Of a node that was compiled for several sizes it is the last one that has run.
        """
        self.end_pass()
        latest: dict[tuple[str, int], NodeState] = {}
        for state in self.nodes:
            if state.calls or not latest.get(state.node.key, state).calls:
                latest[state.node.key] = state
        return [state.frozen() for state in latest.values()]

    def begin(self, layer: Sequence[NodeState]) -> None:
        """A call for these nodes is about to run."""
        if any(state.node.key in self._ran for state in layer):
            self._end_pass()

    def finish(self, layer: Sequence[NodeState]) -> None:
        """These nodes have run filtered, and their histograms are in."""
        for state in layer:
            self._ran[state.node.key] = state

    def reset(self) -> None:
        """Forget all histograms and thresholds."""
        self._ran.clear()
        for state in self.nodes:
            state.reset()

    def _end_pass(self) -> None:
        if self._after_first_pass is not None:
            self._after_first_pass()
            self._after_first_pass = None
        groups: dict[tuple[str, float | None, torch.device], list[NodeState]] = {}
        for state in self._ran.values():
            decision = state.decision
            if decision.group is not None and decision.threshold is None:
                key = (decision.group, decision.recall, state.node.device)
                groups.setdefault(key, []).append(state)
        for members in groups.values():
            controls = [state.control for state in members]
            energy = ops.mean_energy([state.histogram for state in members])
            rows = sum(state.node.rows for state in members)
            energy = mean_over_ranks(self._group, energy, rows)
            shared = ops.shared_threshold(energy, controls[0])
            torch._foreach_copy_(controls, [shared] * len(controls))
        self._ran.clear()


Layer = tuple[ModelState, tuple[NodeState, ...]]
"""The states of a graph's filtered nodes for one anchor, and the model that they belong to."""


class FilteredGraph:
    """A compiled graph with filtered attention, callable with the inputs of the original.

    Args:
        compiled: takes those inputs, then controls, then phases (see :mod:`cef_compile.graph`).
        outputs: number of outputs of the original.
        anchor_of: what names the layer of a call with these inputs; None where nothing does.
        find_layer: makes the layer for an anchor that was not seen before.
        switches: the backend's.
    """

    def __init__(
        self,
        compiled: Callable[..., Sequence[Any]],
        outputs: int,
        anchor_of: Callable[[Sequence[Any]], Any],
        find_layer: Callable[[Any], Layer],
        switches: Switches,
    ) -> None:
        self._compiled = compiled
        self._outputs = outputs
        self._anchor_of = anchor_of
        self._find_layer = find_layer
        self._switches = switches
        self._layers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._only: Layer | None = None

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run the graph for the layer that the arguments belong to.

        Raises:
            RuntimeError: a node has a schedule, and no noise level is set.
        """
        model, layer = self._layer(args)
        if not self._switches.dense and any(state.waiting for state in layer):
            raise RuntimeError(
                "the policy has a schedule, and no noise level is set: call"
                " backend.set_noise_level(sigma) before each step"
            )
        phases = [self._switches.phase(state.decision) for state in layer]
        filtered = [s for s, p in zip(layer, phases, strict=True) if p != Phase.DENSE]
        model.begin(filtered)
        if self._switches.audits and filtered:
            ops.next_seeds([state.control for state in filtered])
        controls = [state.control for state in layer]
        results = self._compiled(*args, *controls, *(int(phase) for phase in phases))
        extra = results[self._outputs :]
        histograms, measures = extra[: len(layer)], extra[len(layer) :]
        keep = [i for i, phase in enumerate(phases) if phase != Phase.DENSE]
        if keep:
            # Copies, since a replayed CUDA graph writes its next results to the same place.
            with torch.no_grad():
                torch._foreach_copy_(
                    [s.histogram for s in filtered] + [s.measures for s in filtered],
                    [histograms[i] for i in keep] + [measures[i] for i in keep],
                )
            for state in filtered:
                state.calls += 1
                for audit in self._switches.audits:
                    audit.add(model, state.node, state.decision, state.measures.clone())
            model.finish(filtered)
        return results[: self._outputs]

    def _layer(self, args: Sequence[Any]) -> Layer:
        anchor = self._anchor_of(args)
        if anchor is None:
            if self._only is None:
                self._only = self._find_layer(None)
            return self._only
        layer = self._layers.get(anchor)
        if layer is None:
            layer = self._layers[anchor] = self._find_layer(anchor)
        return layer
