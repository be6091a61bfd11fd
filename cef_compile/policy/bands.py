"""Decisions by noise level, which is what a schedule comes down to for one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from cef_compile.policy.decision import Decision, Policy, PolicyLike, ask
from cef_compile.policy.node import AttentionNode

Bands = tuple[tuple[float, Decision], ...]
"""(noise level from which on, decision), ascending; the first one is from 0."""


@runtime_checkable
class Banded(Policy, Protocol):
    """A policy whose decisions may depend on the noise level."""

    def noise_bands(self, node: AttentionNode) -> Bands:
        """The decisions on ``node`` by noise level."""
        ...


def noise_bands(policy: PolicyLike, node: AttentionNode) -> Bands:
    """A policy's decisions on ``node`` by noise level; a single band where it does not matter."""
    if isinstance(policy, Banded):
        return policy.noise_bands(node)
    return ((0.0, ask(policy, node)),)


def compiled_decision(bands: Bands) -> Decision:
    """What to compile for a node with these bands: filtered if it is so in any of them."""
    filtered = [decision for _, decision in bands if not decision.is_dense]
    return filtered[0] if filtered else bands[0][1]


def band_at(bands: Bands, level: float) -> int:
    """Index of the band that a noise level (0 or more) belongs to."""
    return sum(lower <= level for lower, _ in bands) - 1


def join_bands(bands: Sequence[tuple[float, Decision]]) -> Bands:
    """Bands without those that say the same as the one below."""
    joined: list[tuple[float, Decision]] = []
    for level, decision in bands:
        if not joined or joined[-1][1] != decision:
            joined.append((level, decision))
    return tuple(joined)
