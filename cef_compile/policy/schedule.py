"""Recall as a function of the noise level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cef_compile.policy.bands import Bands, compiled_decision, join_bands, noise_bands
from cef_compile.policy.builtin import policy_of
from cef_compile.policy.decision import Decision, PolicyLike
from cef_compile.policy.node import AttentionNode


class Schedule:
    """Another policy for each band of noise levels, changed without compiling anything again.

    ``Schedule({0.86: None, 0.5: 0.98, 0.0: 0.9})`` is dense from noise level 0.86 upwards, where
    the composition is decided, keeps 0.98 of the energy from 0.5 to 0.86, and 0.9 below. It may be
    a rule of :class:`~cef_compile.Rules`, and its values may be Rules.

    The backend has to be told the level: call ``backend.set_noise_level(sigma)`` before each step.
    The unit is yours (sigma of a flow from 0 to 1, or of any other schedule), as long as levels
    and bands agree.

    Args:
        bands: from the noise level at which a band begins (it belongs to the band) to what holds
            in it: a recall in (0, 1] (as :class:`Uniform`), None (dense), a :class:`Decision` or
            another policy. One band must begin at 0.

    Raises:
        TypeError: a level or a value is of the wrong type.
        ValueError: a level is negative or not finite, none is 0, or a recall is out of range.
    """

    def __init__(self, bands: Mapping[float, float | Decision | PolicyLike | None]) -> None:
        if not isinstance(bands, Mapping):
            raise TypeError(f"Schedule needs a mapping from noise level to recall, got {bands!r}")
        checked = {check_level("a band's noise level", level): bands[level] for level in bands}
        if 0.0 not in checked:
            low = min(checked, default=None)
            below = "" if low is None else f" below {low!r}"
            raise ValueError(
                f"the schedule says nothing of noise levels{below}: add a band for 0, got {bands!r}"
            )
        self._given = dict(sorted(checked.items(), reverse=True))
        self._policies = {
            level: policy_of(f"noise level {level!r}", value)
            for level, value in sorted(checked.items())
        }

    def __repr__(self) -> str:
        return f"Schedule({self._given!r})"

    @property
    def bands(self) -> dict[float, Any]:
        """The bands as they were given, the highest noise level first."""
        return dict(self._given)

    def decide(self, node: AttentionNode) -> Decision:
        """What to compile for the node: filtered if any band filters it.

        Raises:
            ValueError: two bands want filters that no one graph can hold.
        """
        return compiled_decision(self.noise_bands(node))

    def noise_bands(self, node: AttentionNode) -> Bands:
        """The decisions on ``node`` by noise level, equal neighbours joined.

        Raises:
            ValueError: two bands want filters that no one graph can hold.
        """
        levels = list(self._policies)
        found: dict[float, Decision] = {}
        for lower, upper in zip(levels, [*levels[1:], math.inf], strict=True):
            for level, decision in noise_bands(self._policies[lower], node):
                if level < upper:
                    found[max(level, lower)] = decision
        filtered = [decision for decision in found.values() if not decision.is_dense]
        variants = {decision.variant: decision for decision in filtered}
        if len(variants) > 1:
            one, two, *_ = variants.values()
            raise ValueError(
                f"the bands of node {node.path or '(unnamed)'}#{node.ordinal} want different"
                f" filters, and a compiled graph holds one: got {one!r} and {two!r}"
            )
        return join_bands(sorted(found.items()))


def check_level(name: str, value: Any) -> float:
    """``value`` as a noise level.

    Raises:
        TypeError: it is no plain number. A tensor is none: reading one waits for its device.
        ValueError: it is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__} {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")
    return float(value) + 0.0  # no negative zero
