"""Ring attention: fused ops of one query over shards of the keys, merged by their log-sum-exps.

diffusers gathers the shards before it attends to them one by one, so that all keys are in the
graph: the merged attention is that of the query to the joined shards. Put so, a filter chooses
among the keys of the whole row, and recall means what it means on one GPU. A merge of outputs ``o``
and log-sum-exps ``l``:

    out = o_a - sigmoid(l_b - l_a) * (o_a - o_b)
    lse = l_a - logsigmoid(l_a - l_b)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from cef_compile.graph.patterns import fused
from cef_compile.graph.patterns.calls import call_name, fake_value
from cef_compile.graph.patterns.match import (
    Match,
    Operand,
    RefusedError,
    check_nothing_changes,
    same_shape,
)
from cef_compile.policy import Reason

_SIGMOID = (torch.sigmoid, F.sigmoid)
_LOG_SIGMOID = (F.logsigmoid,)
_SAME = ("query", "mask", "scale", "is_causal", "dropout_p")
"""What all parts have to be given alike."""


@dataclass(frozen=True)
class _Parts:
    """Parts merged so far.

    Attributes:
        ops: the fused ops, in the order in which they were merged.
        swapped: whether heads and length have changed places since the ops' output.
    """

    ops: tuple[fx.Node, ...]
    swapped: bool


def match(node: fx.Node) -> Match | None:
    """The attention that ends in the last merge of a ring."""
    parts = _output(node)
    if parts is None or len(parts.ops) < 2 or any(_output(user) for user in node.users):
        return None
    given = [given for op in parts.ops if (given := fused.arguments(op)) is not None]
    first = given[0]
    result = _in_dtype(node, fake_value(first["query"]).dtype)
    absorbed = fused.swallowed(parts.ops, result)
    if absorbed is None:
        return None  # each part is reported as one
    problem = None
    try:
        _check_alike(given)
        check_nothing_changes(absorbed, result)
    except RefusedError as refused:
        problem = refused.problem
    key, value = (
        Operand([part[name] for part in given]).then(torch.cat, 2) for name in ("key", "value")
    )
    return Match(
        result=result,
        form=f"ring of {len(parts.ops)} {fused.form(parts.ops[0])}",
        query=Operand(first["query"]),
        key=key,
        value=value,
        mask=Operand(first["mask"]),
        scale=first["scale"],
        is_causal=first["is_causal"],
        dropout_p=first["dropout_p"],
        result_views=((torch.transpose, (1, 2)),) if parts.swapped else (),
        absorbed=absorbed,
        problem=problem,
    )


def _output(node: Any) -> _Parts | None:
    """The parts whose merged output a node holds."""
    source, swapped = _peeled(node)
    op = _taken_from(source, fused.OUTPUT)
    if op is not None:
        return _Parts((op,), swapped)
    # o_a - sigmoid(l_b - l_a) * (o_a - o_b)
    before, change = _operands(node, "sub")
    weight, difference = _operands(change, "mul")
    again, added = _operands(difference, "sub")
    if again is None or again is not before:
        return None
    if not isinstance(weight, fx.Node) or weight.target not in _SIGMOID:
        return None
    mine, other = _operands(weight.args[0], "sub")
    old, new = _output(before), _output(added)
    if old is None or new is None or len(new.ops) != 1 or old.swapped != new.swapped:
        return None
    if _lse(mine) != new or _lse(other) != old:
        return None
    shape = fake_value(node).shape
    like_output = all(same_shape(fake_value(out).shape, shape) for out in (before, added))
    like_rows = all(same_shape(fake_value(lse).shape, (*shape[:-1], 1)) for lse in (mine, other))
    if not (like_output and like_rows):
        return None
    return _Parts((*old.ops, *new.ops), old.swapped)


def _lse(node: Any) -> _Parts | None:
    """The parts whose merged log-sum-exp a node holds."""
    source, swapped = _peeled(node)
    op = _taken_from(source, fused.LSE)
    if op is not None:
        return _Parts((op,), swapped)
    # l_a - logsigmoid(l_a - l_b)
    before, change = _operands(node, "sub")
    if not isinstance(change, fx.Node) or change.target not in _LOG_SIGMOID:
        return None
    again, added = _operands(change.args[0], "sub")
    if again is None or again is not before:
        return None
    old, new = _lse(before), _lse(added)
    if old is None or new is None or len(new.ops) != 1 or old.swapped != new.swapped:
        return None
    return _Parts((*old.ops, *new.ops), old.swapped)


def _operands(node: Any, name: str) -> tuple[Any, Any]:
    """Both operands of an arithmetic call; Nones where it is another."""
    if call_name(node) != name or len(node.args) != 2 or node.kwargs:
        return None, None
    return node.args[0], node.args[1]


def _peeled(node: Any) -> tuple[Any, bool]:
    """What is behind casts, copies, unit dimensions and exchanges of heads and length.

    Returns:
        that node, and whether the two are exchanged.
    """
    swapped = False
    while isinstance(node, fx.Node) and node.args:
        name = call_name(node)
        if name == "transpose" and {*node.args[1:]} == {1, 2}:
            swapped = not swapped
        elif not (name in ("cast", "contiguous") or node.target in ("squeeze", "unsqueeze")):
            break
        node = node.args[0]
    return node, swapped


def _taken_from(node: Any, index: int) -> fx.Node | None:
    """The fused op of which a node takes one output."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    op, taken = node.args
    if not isinstance(op, fx.Node) or fused.arguments(op) is None:
        return None
    return op if taken == index else None


def _in_dtype(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The merged output in the query's dtype, where it is cast back to it."""
    for user in node.users:
        if call_name(user) == "cast" and fake_value(user).dtype == dtype:
            return user
    return node


def _check_alike(given: list[dict[str, Any]]) -> None:
    """Raise where the parts are not of one attention, or have a mask, which is of one shard."""
    first = {**given[0], "query": _peeled(given[0]["query"])}
    for part in given:
        if part["mask"] is not None:
            raise RefusedError(Reason.PARTIAL, "its parts have masks")
        if part["is_causal"]:
            raise RefusedError(Reason.CAUSAL, "its parts are causal")
        same = {**part, "query": _peeled(part["query"])}
        if any(same[name] != first[name] for name in _SAME):
            raise RefusedError(Reason.PARTIAL, "its parts have other queries or scales")
