"""The torch.compile backend: find -> decide -> rewrite -> inner compiler."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, fx, nn

from cef_compile import inner as inner_compilers
from cef_compile.decide import Decider
from cef_compile.distributed import check_group, spelled, together
from cef_compile.errors import RankError, UnsupportedNodeError
from cef_compile.graph import (
    Break,
    Owner,
    Site,
    check_grid,
    compiled_module,
    find_anchor,
    find_break,
    find_sites,
    find_split,
    rewrite,
    with_grids,
    worth_saying,
)
from cef_compile.layers import Layers, node_bands
from cef_compile.ops import Phase
from cef_compile.policy import (
    Balanced,
    Decision,
    NodePolicy,
    PolicyLike,
    Rules,
    Uniform,
    check_level,
    check_policy,
    check_sizes,
)
from cef_compile.report import Audit, Report, ReportedBreak
from cef_compile.runtime import FilteredGraph, Layer, ModelState, Switches

DEFAULT_RECALL = 0.95
"""Recall of a backend that is given neither a recall nor a policy."""


class Backend:
    """A torch.compile backend that filters attention; make one with :func:`backend`.

    One object may compile several models and serves each apart. Pass it as ``backend=`` to
    ``torch.compile``, ``module.compile`` or diffusers' ``compile_repeated_blocks``.
    """

    __name__ = "cef"  # what Dynamo calls the compiler in its logs and errors

    def __init__(
        self,
        policy: PolicyLike,
        inner: str | Callable[..., Any],
        strict: bool,
        min_kv_len: int | None,
        group: dist.ProcessGroup | None = None,
        grid: tuple[int, int, int] | None = None,
    ) -> None:
        self._decider = Decider(policy, strict, min_kv_len)
        self._inner = inner_compilers.check_inner(inner)
        self._group = check_group(group)
        self._grid = _check_grid(grid)
        self._switches = Switches()
        self._level: float | None = None
        # A report outlives its model, so the states are held here and the models are not.
        self._states: list[ModelState] = []
        self._twins: dict[str, list[ModelState]] = {}
        self._models: WeakKeyDictionary[nn.Module, ModelState] = WeakKeyDictionary()
        self._breaks: dict[ModelState, dict[Break, None]] = {}
        self._warned: set[Hashable] = set()

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any
    ) -> Callable[..., Any]:
        """Compile one graph; called by Dynamo.

        Args:
            gm: graph from Dynamo.
            example_inputs: its inputs.
            kwargs: ``mode`` and ``options`` of torch.compile, passed on to the inner compiler.

        Raises:
            UnsupportedNodeError: with ``strict``, for a node that should be filtered and cannot be.
            RankError: with ``group``, where another rank has failed or decides otherwise.
        """
        try:
            with together(self._group) as outcome:
                compiled = self._compile(gm, example_inputs, kwargs)
                outcome.decisions = self._decisions()
        except RankError as error:
            raise inner_compilers.surfaced(error) from error
        return compiled

    def _compile(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        sites = with_grids(find_sites(gm), self._grid)
        anchor = find_anchor(gm, example_inputs)
        owner = anchor.owner(anchor.of(example_inputs))
        try:
            layers, chosen = self._decide(sites, owner)
        except (UnsupportedNodeError, TypeError, ValueError) as error:
            raise inner_compilers.surfaced(error) from error
        self._note_break(gm, owner, layers)
        self._warn(gm, sites, owner)
        if not chosen:
            return inner_compilers.compile_with(self._inner, gm, example_inputs, kwargs)
        controls = [node.control for node in layers.get(owner)[1]]
        rewritten = rewrite(gm, example_inputs, list(chosen.items()), controls, Phase.FILTERED)
        compiled = inner_compilers.compile_with(
            self._inner, rewritten.module, rewritten.example_inputs, kwargs
        )

        def find_layer(named: Any) -> Layer:
            return layers.get(anchor.owner(named))

        return FilteredGraph(compiled, rewritten.outputs, anchor.of, find_layer, self._switches)

    @property
    def policy(self) -> PolicyLike:
        """Who gets how much."""
        return self._decider.policy

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """The grid of tokens that was given."""
        return self._grid

    @property
    def report(self) -> Report:
        """What was found, decided and why, and what the last calls did. Synchronises."""
        nodes = [node.reported(state.name) for state in self._states for node in state.nodes]
        breaks = [
            ReportedBreak(state.name, found.place, found.reason, found.remedy)
            for state in self._states
            for found in worth_saying(self._breaks.get(state, ()))
        ]
        return Report(repr(self.policy), nodes, self._unmatched(), breaks)

    @contextmanager
    def audit(self) -> Iterator[Audit]:
        """Measure what filtered calls deliver while the block runs; costs about 1 % of dense.

        Yields:
            an :class:`~cef_compile.report.Audit`, to be read during or after the block.
        """
        audit = Audit()
        self._switches.audits.append(audit)
        try:
            yield audit
        finally:
            self._switches.audits.remove(audit)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run dense while the block runs (warm-up steps); nothing is recompiled either way."""
        self._switches.dense += 1
        try:
            yield
        finally:
            self._switches.dense -= 1

    def node_of(self, control: Tensor) -> tuple[str, int]:
        """Path and ordinal of the node whose op was called with this very ``control``."""
        return next(
            node.node.key
            for state in self._states
            for node in state.nodes
            if node.variant is not None and node.control is control
        )

    def reset(self) -> None:
        """Forget all histograms and thresholds, so that the next calls repeat the first ones."""
        for state in self._states:
            state.reset()

    def set_policy(self, policy: PolicyLike) -> None:
        """Change the policy of what is compiled already, without compiling anything again.

        A node that was compiled dense, or with another filter, rule or certificate than the new
        policy wants, cannot follow: it runs dense, and the report says so.

        Raises:
            TypeError: ``policy`` is none.
            UnsupportedNodeError: with ``strict``, for a node that cannot follow; nothing changes.
            RankError: with ``group``, where another rank has failed or decides otherwise; nothing
                changes. Every rank has to call this.
        """
        changes = []
        with together(self._group) as outcome:
            check_policy(policy)
            for state in self._states:
                for node in state.nodes:
                    follow = self._decider.follow
                    decision = follow(policy, node.node, node.decision, node.variant)
                    bands = node_bands(policy, node.node, decision)
                    changes.append((node, decision, bands))
                    outcome.decisions[f"{state} {node}"] = spelled(bands or decision)
        self._decider.policy = policy
        for node, decision, bands in changes:
            node.decide(decision, bands, self._level)
        if isinstance(policy, NodePolicy):
            self._warn_of_differences(policy)

    def set_noise_level(self, sigma: float | None) -> None:
        """Say which noise level the coming calls are at, for :class:`Schedule` policies.

        Call it before each step. Nothing is recompiled and nothing waits for the device.

        Args:
            sigma: in the unit of the schedule's bands, at least 0; None forgets the level, and a
                call that needs one then raises.

        Raises:
            TypeError: ``sigma`` is no plain number. Reading a tensor on a GPU would wait for it;
                schedulers keep their sigmas on the CPU, where ``.item()`` costs nothing.
            ValueError: it is negative or not finite.
        """
        self._level = None if sigma is None else check_level("sigma", sigma)
        for state in self._states:
            state.set_level(self._level)

    @property
    def noise_level(self) -> float | None:
        """The noise level that was set last; None where none is."""
        return self._level

    def set_recall(self, recall: float) -> None:
        """Change the recall of a :class:`Balanced` or :class:`Uniform` policy; see `set_policy`.

        Raises:
            TypeError: the policy has no single recall.
            ValueError: ``recall`` is outside (0, 1].
        """
        policy = self.policy
        if not isinstance(policy, (Balanced, Uniform)):
            raise TypeError(f"{policy!r} has no single recall; use set_policy")
        self.set_policy(dataclasses.replace(policy, recall=recall))

    def frozen_policy(self, model: nn.Module | None = None) -> NodePolicy:
        """The decisions as they are now, with the thresholds that `Balanced` has found fixed.

        The result does what the next call would do, whatever ran before; `save_policy` keeps it.
        It works for any policy, also one of your own code. Synchronises with the device. With
        ``group``, every rank has to call this.

        Args:
            model: which model, for a backend that serves several.

        Raises:
            RuntimeError: nothing has run yet.
            ValueError: the backend serves several models, or not this one, or its `Balanced` is
                inside a schedule.
        """
        states = [state for state in self._states if state.nodes]
        if not states:
            raise RuntimeError("no attention node seen yet: run the compiled model once")
        if model is not None:
            states = [state for state in states if state is self._models.get(model)]
            if not states:
                raise ValueError(f"this backend has not compiled this {type(model).__name__}")
        if len(states) > 1:
            names = ", ".join(state.name for state in states)
            raise ValueError(f"this backend serves several models ({names}): say which one")
        (state,) = states
        class_ = next(name for name, twins in self._twins.items() if state in twins)
        return NodePolicy(class_, state.frozen())

    def _decide(self, sites: Sequence[Site], owner: Owner) -> tuple[Layers, dict[Site, Decision]]:
        """The layers of the model at hand, and the sites to compile filtered.

        All layers that may run this graph are asked: what one of them filters is compiled in.
        """
        decisions = [[self._decider.decide(s, prefix) for s in sites] for prefix in owner.siblings]
        chosen = _choose(sites, decisions)
        for site, decision in chosen.items():
            if decision.order == "grid":
                check_grid(site, self._grid)
        layers = Layers(self._decider, self._model_state, sites, chosen)
        layers.get(owner)
        return layers, chosen

    def _decisions(self) -> dict[str, str]:
        """All decisions so far, by model and node, for the comparison with other ranks."""
        return {
            f"{state} {node}": spelled(node.bands or node.decision)
            for state in self._states
            for node in state.nodes
        }

    def _model_state(self, model: nn.Module | None) -> ModelState:
        if model is not None and model in self._models:
            return self._models[model]
        class_ = "(unnamed)" if model is None else type(model).__name__
        state = ModelState(class_, self._warn_of_unmatched_rules, self._level, self._group)
        self._states.append(state)
        twins = self._twins.setdefault(class_, [])
        twins.append(state)
        if len(twins) > 1:
            for i, twin in enumerate(twins, 1):
                twin.name = f"{class_} {i}"
        if model is not None:
            self._models[model] = state
        return state

    def _note_break(self, gm: fx.GraphModule, owner: Owner, layers: Layers) -> None:
        """Keep what a graph tells of the breaks of its model."""
        around = compiled_module()
        found = find_break(gm) or find_split(owner, around)
        if found is not None:
            model = owner.model if owner.prefix or around is None else around
            state = layers.get(owner)[0] if model is None else self._model_state(model)
            self._breaks.setdefault(state, {})[found] = None

    def _unmatched(self) -> list[str]:
        if not isinstance(self.policy, Rules):
            return []
        return self.policy.unmatched(
            [node.node.path for state in self._states for node in state.nodes]
        )

    def _warn(self, gm: fx.GraphModule, sites: Sequence[Site], owner: Owner) -> None:
        """Warn of a whole model without attention, and of rules that match nothing in it."""
        if isinstance(self.policy, NodePolicy):
            self._warn_of_differences(self.policy)
        around = compiled_module()
        is_part = around is not None and owner.module is not around
        if owner.prefix or is_part or find_break(gm) is not None:
            return  # only a part of the model: what is missing may be in another graph
        if not sites and not any(state.nodes for state in self._states):
            self._warn_once(
                "cef_compile found no attention in the compiled graph, which runs as it would"
                " without this backend; cef_compile.explain(model, *args) shows what was seen"
            )
        self._warn_of_unmatched_rules()

    def _warn_of_unmatched_rules(self) -> None:
        if isinstance(self.policy, NodePolicy):
            self._warn_of_differences(self.policy, complete=True)
            return
        for pattern in self._unmatched():
            self._warn_once(
                f"rule {pattern!r} matches no attention node;"
                " cef_compile.explain(model, *args) lists their paths"
            )

    def _warn_of_differences(self, policy: NodePolicy, complete: bool = False) -> None:
        """Warn once of each way in which a model is not the one that the policy was made for.

        Args:
            policy: the policy.
            complete: whether all nodes are known, so that missing ones are missing.
        """
        for class_, twins in self._twins.items():
            for state in twins:
                nodes = [node.node for node in state.nodes]
                if not nodes:
                    continue
                found = policy.differences(class_, nodes, complete or state.complete)
                for kind, difference in found.items():
                    self._warn_once(
                        f"the policy fits this model only in part: {difference}",
                        key=(policy, state, kind),
                    )

    def _warn_once(self, message: str, key: Hashable = None) -> None:
        key = message if key is None else key
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, UserWarning, stacklevel=2)


def backend(
    recall: float | None = None,
    *,
    policy: PolicyLike | None = None,
    inner: str | Callable[..., Any] = "inductor",
    strict: bool = False,
    min_kv_len: int | None = None,
    group: dist.ProcessGroup | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Backend:
    """A torch.compile backend that computes only the key tiles that carry the attention energy.

    ``torch.compile(model, backend=cef_compile.backend(recall=0.95))``

    Args:
        recall: mean over the model's filtered nodes of the share of attention energy kept, in
            (0, 1]: short for ``policy=Balanced(recall)``. 0.95 if neither is given.
        policy: a :class:`Balanced`, :class:`Uniform` or :class:`Rules`, an object with a method
            ``decide(node) -> Decision``, or a function of a node.
        inner: what compiles the rest: "inductor", "aot_eager", "eager", the name of any registered
            backend, or a function of (graph module, example inputs).
        strict: raise :class:`UnsupportedNodeError` for a node that the policy wants filtered and
            that cannot be, in place of keeping it dense.
        min_kv_len: nodes with fewer keys stay dense; None for the measured break-even of the
            device.
        group: ranks that run this model together, each on its part (``dist.group.WORLD`` for all).
            They share the threshold of :class:`Balanced`, and raise a :class:`RankError` together
            where one fails to compile or decides otherwise. All must compile the same graphs in the
            same order. None leaves each rank to itself.
        grid: (frames, height, width) of the tokens after patching (1 frame for an image), in raster
            order: tiles are cut as its cubes. None for what the graph, or the call that is running
            while it is compiled, shows; give it where the report says that no grid was found.
            Compiling raises a ValueError where the tokens of a filtered node do not fit it.

    Raises:
        TypeError: ``policy``, ``inner``, ``recall``, ``min_kv_len``, ``group`` or ``grid`` is of
            the wrong type.
        ValueError: ``recall`` is outside (0, 1], both it and a policy are given, ``inner`` is no
            registered backend, ``min_kv_len`` is negative, ``group`` lacks this rank, or ``grid``
            is not three sizes above 0.
    """
    if recall is not None and policy is not None:
        raise ValueError(f"give recall or policy, not both; got {recall!r} and {policy!r}")
    if policy is None:
        policy = Balanced(DEFAULT_RECALL if recall is None else recall)
    return Backend(policy, inner, strict, min_kv_len, group, grid)


def _choose(sites: Sequence[Site], decisions: list[list[Decision]]) -> dict[Site, Decision]:
    """The sites that some layer wants filtered, each with the first such decision."""
    chosen = {}
    for i, site in enumerate(sites):
        wanted = [layer[i] for layer in decisions if not layer[i].is_dense]
        if wanted:
            chosen[site] = wanted[0]
    return chosen


def cef(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend by its registered name: ``torch.compile(model, backend="cef", options={...})``.

    Calls with equal options share one :class:`Backend`, which :func:`named_backend` returns.

    Args:
        gm, example_inputs, mode: from torch.compile.
        options: arguments of :func:`backend` by name; all others are Inductor's.
    """
    ours = {k: v for k, v in (options or {}).items() if k in _OPTIONS}
    others = {k: v for k, v in (options or {}).items() if k not in _OPTIONS}
    kwargs = {k: v for k, v in (("mode", mode), ("options", others)) if v}
    return named_backend(**ours)(gm, example_inputs, **kwargs)


def named_backend(**options: Any) -> Backend:
    """The :class:`Backend` behind ``backend="cef"`` with these options, for its report or audit.

    Args:
        options: the arguments of :func:`backend` that were given under ``options=``.

    Raises:
        TypeError, ValueError: as :func:`backend`.
    """
    key = tuple(sorted((name, _hashable(value)) for name, value in options.items()))
    if key not in _named:
        _named[key] = backend(**options)
    return _named[key]


_OPTIONS = ("recall", "policy", "inner", "strict", "min_kv_len", "group", "grid")
_named: dict[tuple[Any, ...], Backend] = {}
"""Dynamo calls a named backend anew for every graph, and a model's graphs belong together."""


def _check_grid(grid: Any) -> tuple[int, int, int] | None:
    if grid is None:
        return None
    frames, height, width = check_sizes("grid", grid, 3, least=1)
    return frames, height, width


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)
