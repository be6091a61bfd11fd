"""The layers, of one model or several, that a compiled graph is called for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from cef_compile.decide import Decider, join
from cef_compile.graph import Owner, Site, concrete
from cef_compile.policy import AttentionNode, Bands, Decision, PolicyLike, noise_bands
from cef_compile.runtime import Layer, ModelState


def node_bands(policy: PolicyLike, node: AttentionNode, decision: Decision) -> Bands:
    """The bands of a node's schedule; none where it is dense for good or has none."""
    bands = () if decision.is_dense else noise_bands(policy, node)
    return bands if len(bands) > 1 else ()


class Layers:
    """Node states by model and layer, made when a model is met for the first time.

    Args:
        decider: decides for each layer's nodes.
        model_state: finds or makes the state of a model.
        sites: attention calls of the graph.
        chosen: those that are compiled filtered, with the decision whose filter is.
    """

    def __init__(
        self,
        decider: Decider,
        model_state: Callable[[nn.Module | None], ModelState],
        sites: Sequence[Site],
        chosen: dict[Site, Decision],
    ) -> None:
        self._decider = decider
        self._model_state = model_state
        # Sizes are fixed now: once compiled, comparing symbolic ones could add no guard any more.
        self._sites = [replace(site, node=concrete(site.node)) for site in sites]
        self._variants = [chosen[site].variant if site in chosen else None for site in sites]
        self._known: WeakKeyDictionary[nn.Module, dict[str, Layer]] = WeakKeyDictionary()
        self._unowned: dict[str, Layer] | None = None

    def get(self, owner: Owner) -> Layer:
        """The filtered nodes of a layer, in the order of the graph, and their model.

        Raises:
            UnsupportedNodeError: a layer wants another filter than the graph was compiled with,
                and ``strict`` is on.
        """
        known = self._unowned if owner.model is None else self._known.get(owner.model)
        if known is None or owner.prefix not in known:
            known = self._add(owner)
            if owner.model is None:
                self._unowned = known
            else:
                self._known[owner.model] = known
        return known[owner.prefix]

    def _add(self, owner: Owner) -> dict[str, Layer]:
        model = self._model_state(owner.model)
        layers = {}
        for prefix in owner.siblings:
            nodes = []
            for site, variant in zip(self._sites, self._variants, strict=True):
                node = site.node.at(join(prefix, site.node.path))
                decision = self._decider.settle(self._decider.decide(site, prefix), node, variant)
                bands = node_bands(self._decider.policy, node, decision)
                nodes.append(model.node(node, decision, variant, bands))
            layers[prefix] = (model, tuple(node for node in nodes if node.variant is not None))
        return layers
