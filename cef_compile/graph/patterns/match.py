"""What a pattern finds: where an attention's inputs are in the graph, and how to look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cef_compile.graph.patterns.calls import fake_value, mutates
from cef_compile.policy import Reason

View = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a tensor and its other arguments."""


@dataclass(frozen=True)
class Operand:
    """An input of an attention: a value in the graph, seen through some views.

    Attributes:
        source: the value; an FX node, a list of nodes that the first view joins, or None where
            there is no such input.
        views: applied to it one after the other.
    """

    source: Any
    views: tuple[View, ...] = ()

    def then(self, function: Callable[..., Any], *args: Any) -> Operand:
        """The operand through one more view."""
        return Operand(self.source, (*self.views, (function, args)))

    @property
    def fake(self) -> Any:
        """The fake tensor that the views give; None where there is none."""
        return look(fake_value(self.source), self.views)


NOTHING = Operand(None)


@dataclass(frozen=True)
class Match:
    """An attention in a graph, whichever way it is computed.

    Attributes:
        result: the node that holds the attention's output.
        form: how it is written, in a word for reports.
        query, key, value: as ``(B, heads, length, head_dim)`` where the pattern can say so.
        mask: as SDPA's ``attn_mask``.
        rows: which queries have a result, ``(B or 1, 1, q_len, 1)``; that of the others is 0.
        scale: factor of the scores; None for the usual one, an FX node where it is computed.
        is_causal, dropout_p, enable_gqa: as SDPA's.
        result_views: take ``(B, heads, q_len, head_dim)`` to the form of ``result``.
        absorbed: the nodes that the attention replaces besides ``result``, in no order.
        problem: why this attention can only be reported; None where it can be replaced.
    """

    result: fx.Node
    form: str
    query: Operand
    key: Operand
    value: Operand
    mask: Operand = NOTHING
    rows: Operand = NOTHING
    scale: Any = None
    is_causal: Any = False
    dropout_p: Any = 0.0
    enable_gqa: Any = False
    result_views: tuple[View, ...] = ()
    absorbed: frozenset[fx.Node] = field(default_factory=frozenset)
    problem: tuple[Reason, str] | None = None


class RefusedError(Exception):
    """A pattern has seen an attention and cannot take it.

    Attributes:
        problem: the reason and a detail.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        self.problem = (reason, detail)
        super().__init__(f"{reason} ({detail})")


def look(fake: Any, views: Iterable[View]) -> Any:
    """A fake tensor through views."""
    first = fake[0] if isinstance(fake, (list, tuple)) and fake else fake
    if not isinstance(first, torch.Tensor):
        return fake
    with getattr(first, "fake_mode", torch.no_grad()):
        for function, args in views:
            fake = function(fake, *args)
    return fake


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal. Adds no guard where they are symbolic."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return False


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(same, a, b))


def check_nothing_changes(absorbed: Iterable[fx.Node], result: fx.Node) -> None:
    """The work of all nodes moves to the last one: no value may change on the way there.

    Raises:
        RefusedError: something is changed in place between the first node and the last.
    """
    group = {*absorbed, result}
    started = False
    for node in result.graph.nodes:
        if node is result:
            return
        started = started or node in group
        if started and node not in group and mutates(node):
            raise RefusedError(
                Reason.UNKNOWN_FORM, f"{node.name} changes a tensor in place in the middle of it"
            )
