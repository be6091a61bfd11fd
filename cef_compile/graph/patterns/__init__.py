"""The forms in which attention appears in a graph, one file each.

A pattern is a function of a node that returns a :class:`Match` where the node belongs to it. A
match without a problem says how to put ``cef::attention`` in the place of all its nodes; one with a
problem is reported and left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from cef_compile.graph.patterns import flash, fused, library, ring, sdpa, softmax
from cef_compile.graph.patterns.match import Match, Operand, View, look, same

PATTERNS = (
    sdpa.match,
    softmax.match,
    flash.match,
    fused.match,
    ring.match,
    library.match_multi_head,
    library.match_flex,
)

__all__ = ["PATTERNS", "Match", "Operand", "View", "find_matches", "look", "same"]


def find_matches(graph: fx.Graph) -> list[Match]:
    """All attentions of a graph, in the order of their outputs."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[fx.Node, Match] = {}
    for match in _matches(graph):
        found.setdefault(match.result, match)
    # A part of a larger attention is none of its own.
    for match in list(found.values()):
        for node in match.absorbed:
            found.pop(node, None)
    return sorted(found.values(), key=lambda match: position[match.result])


def _matches(graph: fx.Graph) -> Iterator[Match]:
    for node in graph.nodes:
        for pattern in PATTERNS:
            match = pattern(node)
            if match is not None:
                yield match
