"""Masks as eager attention applies them, in the form that SDPA takes: true where a key counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from cef_compile.graph.patterns.calls import (
    ALIASING,
    argument,
    call_name,
    fake_value,
    is_number,
    mutates,
    transposition,
)
from cef_compile.graph.patterns.match import NOTHING, Operand, RefusedError
from cef_compile.policy import Reason

HIDING = -1e4
"""A score at or below this is one of a hidden key: its weight is 0 in every dtype, beside visible
scores of any usual size. Models write -inf, the lowest number of a dtype, -1e9 or -1e4; where ALL
keys are hidden these differ (NaN or an even spread), and SDPA's boolean mask gives 0."""
REACH = 32
"""How many nodes behind a mask are looked at to describe it."""


def filled(condition: Any, fill: Any, factor: float) -> Operand:
    """The mask of ``scores.masked_fill(condition, fill)``.

    Args:
        condition: FX node of a bool tensor, true where a key is hidden.
        fill: what the score is set to.
        factor: by which scores are multiplied afterwards.

    Raises:
        RefusedError: it hides nothing, or cannot be told.
    """
    _check_fill(fill, factor)
    hidden = boolean(condition)
    if call_name(condition) == "not" and not changed_in_place(condition.args[0]):
        return boolean(condition.args[0])  # as it was expanded, which its negation is no more
    return hidden.then(torch.logical_not)


def boolean(condition: Any) -> Operand:
    """A bool tensor as an operand.

    Raises:
        RefusedError: it is no bool tensor.
    """
    fake = fake_value(condition)
    if not isinstance(fake, torch.Tensor) or fake.dtype != torch.bool:
        raise RefusedError(Reason.MASK, "the mask's condition is not a bool tensor")
    return Operand(condition)


def kept(condition: Any, fill: Any, factor: float) -> Operand:
    """The mask of ``torch.where(condition, scores, fill)``; see :func:`filled`."""
    _check_fill(fill, factor)
    return boolean(condition)


def added(mask: Any, factor: float) -> Operand:
    """The mask of ``scores + mask``: boolean where it is provably 0 or hiding, else as it is.

    Args:
        mask: FX node of a float tensor.
        factor: by which scores are multiplied afterwards.

    Raises:
        RefusedError: it is not a tensor.
    """
    fake = fake_value(mask)
    if not isinstance(mask, fx.Node) or not isinstance(fake, torch.Tensor):
        raise RefusedError(Reason.UNKNOWN_FORM, f"{mask!r} is added to the scores")
    operand = Operand(mask)
    return operand.then(torch.eq, 0) if factor > 0 and _hides_or_keeps(mask, factor) else operand


def split(mask: Any) -> tuple[Operand, Operand]:
    """A mask of SDPA as one of keys and one of queries, where it is both: ``queries & keys``.

    A query that the second hides sees no key at all, and SDPA's result for it is 0.

    Args:
        mask: FX node of a mask, or None.

    Returns:
        the mask of keys ``(..., 1, kv_len)`` and that of queries ``(..., q_len, 1)``; else the mask
        as it is, and nothing.
    """
    whole = Operand(mask), NOTHING
    node = mask
    while call_name(node) == "cast" and fake_value(node).dtype == torch.bool:
        node = node.args[0]
    if call_name(node) != "and" or changed_in_place(node):
        return whole
    pair = [argument(node, 0, "input", "self"), argument(node, 1, "other")]
    for keys, rows in (pair, pair[::-1]):
        both_bool = all(isinstance(x, fx.Node) and _is_bool_4d(x) for x in (keys, rows))
        if both_bool and _is_even(keys, -2) and _is_even(rows, -1):
            return (
                Operand(keys).then(torch.narrow, -2, 0, 1),
                Operand(rows).then(torch.narrow, -1, 0, 1),
            )
    return whole


def _is_bool_4d(node: fx.Node) -> bool:
    fake = fake_value(node)
    return isinstance(fake, torch.Tensor) and fake.dtype == torch.bool and fake.dim() == 4


def _is_even(node: Any, dim: int) -> bool:
    """Whether all elements along a dimension, counted from the last, are the same."""
    if not isinstance(node, fx.Node) or changed_in_place(node):
        return False
    fake = fake_value(node)
    size, stride = fake.shape[dim], fake.stride()[dim]
    if (isinstance(size, int) and size == 1) or (isinstance(stride, int) and stride == 0):
        return True
    name, before = call_name(node), node.args[0] if node.args else None
    if name in ("cast", "contiguous"):
        return _is_even(before, dim)
    if name == "repeat" and fake_value(before).dim() == fake.dim():
        return _is_even(before, dim)
    if name in ("transpose", "permute"):
        function, rest = transposition(node)
        moved = function(torch.empty(*range(fake.dim()), device="meta"), *rest)
        return _is_even(before, moved.shape[dim] - fake.dim())
    return False


def describe(mask: Any) -> str:
    """What a mask looks like that is another one for every query, as far as the graph says it."""
    compared = False
    for node in _behind(mask):
        name = call_name(node)
        if name == "eq" and all(isinstance(fake_value(x), torch.Tensor) for x in node.args):
            return "block-diagonal: by segment"
        compared = compared or name == "order"
    return "by position, as of windows" if compared else "not the same for every query"


def _behind(mask: Any) -> Iterator[fx.Node]:
    """The nodes that a mask is computed from or changed by in place, the nearest first."""
    seen, todo = {mask}, [mask] if isinstance(mask, fx.Node) else []
    while todo and len(seen) <= REACH:
        node = todo.pop(0)
        yield node
        changes = [user for user in node.users if mutates(user) and user.args[:1] == (node,)]
        todo += [other for other in (*changes, *node.all_input_nodes) if other not in seen]
        seen.update(todo)


def _check_fill(fill: Any, factor: float) -> None:
    if not is_number(fill) or not fill * factor <= HIDING:
        raise RefusedError(Reason.MASK, f"hidden scores are set to {fill}")


def _hides_or_keeps(node: Any, factor: float) -> bool:
    """Whether every element of a value is 0 or, times ``factor``, hiding; False if not known."""
    if not isinstance(node, fx.Node) or changed_in_place(node):
        return False
    name = call_name(node)
    if name in ("view", "repeat", "transpose", "permute", "contiguous"):
        return _hides_or_keeps(node.args[0], factor)
    if name == "cast":
        to_float = bool(fake_value(node).dtype.is_floating_point)
        return to_float and _hides_or_keeps(node.args[0], factor)
    if name == "where":
        values = [argument(node, i, key) for i, key in ((1, "input"), (2, "other"))]
        numbers = all(map(is_number, values))
        return numbers and all(value == 0 or value * factor <= HIDING for value in values)
    if name in ("masked_fill", "masked_fill_"):
        base, fill = argument(node, 0, "input", "self"), argument(node, 2, "value")
        if call_name(base) != "zeros" or changed_in_place(base, by=node):
            return False
        return is_number(fill) and bool(fill * factor <= HIDING)
    if name == "mul":
        value, other = argument(node, 0, "input"), argument(node, 1, "other")
        if is_number(value):
            value, other = other, value
        return is_number(other) and bool(other * factor <= HIDING) and _is_0_or_1(value)
    return False


def _is_0_or_1(node: Any) -> bool:
    if not isinstance(node, fx.Node) or changed_in_place(node):
        return False
    name = call_name(node)
    if name in ("view", "repeat", "transpose", "permute", "contiguous"):
        return _is_0_or_1(node.args[0])
    if name == "cast":
        source = fake_value(node.args[0])
        return bool(source.dtype == torch.bool) or _is_0_or_1(node.args[0])
    if name == "sub":
        one, other = argument(node, 0, "input"), argument(node, 1, "other")
        return bool(one == 1 and node.kwargs.get("alpha", 1) == 1) and _is_0_or_1(other)
    return False


def changed_in_place(node: fx.Node, by: fx.Node | None = None) -> bool:
    """Whether a value, or one that may share its memory, is changed by another node than ``by``."""
    seen, todo = {node}, [node]
    while todo:
        current = todo.pop()
        for user in current.users:
            if user is by or user in seen:
                continue
            if mutates(user) and user.args and user.args[0] is current:
                return True
            if call_name(user) in ALIASING:
                seen.add(user)
                todo.append(user)
    return False
