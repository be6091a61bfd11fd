"""The two products of an attention: queries with keys, and weights with values.

``matmul`` and ``bmm`` as they are, ``baddbmm`` with its bias and factor, ``einsum`` by its
equation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cef_compile.graph.patterns.calls import argument, call_name, fake_value, is_number
from cef_compile.graph.patterns.match import Operand, RefusedError, View
from cef_compile.policy import Reason


@dataclass(frozen=True)
class Scores:
    """``scale * query @ key^T + bias``; operands are ``[..., length, head_dim]``.

    Attributes:
        query, key: the factors.
        scale: constant factor.
        bias: an FX node that is added, or None.
    """

    query: Operand
    key: Operand
    scale: float = 1.0
    bias: Any = None


@dataclass(frozen=True)
class Weighted:
    """``weights @ value``.

    Attributes:
        value: ``[..., kv_len, head_dim]``.
        views: take ``[..., q_len, head_dim]`` to the form of the product.
    """

    value: Operand
    views: tuple[View, ...] = ()


def factors(node: fx.Node) -> tuple[Any, ...]:
    """The two tensors that a product multiplies."""
    name = call_name(node)
    if name in ("matmul", "bmm"):
        return argument(node, 0, "input", "self"), argument(node, 1, "other", "mat2")
    if name == "baddbmm":
        return argument(node, 1, "batch1"), argument(node, 2, "batch2")
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        return tuple(operands[0])
    return tuple(operands)


def scores(node: fx.Node) -> Scores:
    """What a product says as the one of queries and keys.

    Raises:
        RefusedError: it is no such product.
    """
    name = call_name(node)
    if name == "einsum":
        return _einsum_scores(node)
    query, key = factors(node)
    keys = Operand(key).then(torch.transpose, -2, -1)
    if name in ("matmul", "bmm"):
        return Scores(Operand(query), keys)
    alpha, beta = argument(node, 4, "alpha", default=1), argument(node, 3, "beta", default=1)
    if not is_number(alpha):
        raise RefusedError(Reason.SCALE, "alpha of baddbmm is computed in the graph")
    if not is_number(beta) or beta not in (0, 1):
        raise RefusedError(Reason.UNKNOWN_FORM, f"beta={beta} of baddbmm")
    bias = argument(node, 0, "input", "self") if beta else None
    return Scores(Operand(query), keys, float(alpha), bias)


def weighted(node: fx.Node, weights: fx.Node) -> Weighted:
    """What a product says as the one of attention weights and values.

    Raises:
        RefusedError: it is no such product.
    """
    name = call_name(node)
    pair = factors(node)
    if len(pair) != 2 or pair[0] is not weights or pair[1] is weights:
        raise RefusedError(
            Reason.UNKNOWN_FORM, "the softmax is not the first factor of the second product"
        )
    if name == "einsum":
        return _einsum_weighted(node, pair[1])
    if name == "baddbmm":
        alpha, beta = argument(node, 4, "alpha", default=1), argument(node, 3, "beta", default=1)
        if not (is_number(alpha) and is_number(beta) and alpha == 1 and beta == 0):
            raise RefusedError(Reason.UNKNOWN_FORM, "the second product adds or scales")
    return Weighted(Operand(pair[1]))


def _equation(node: fx.Node) -> tuple[str, str, str]:
    """The letters of two operands and of the result, ``...`` spelled out as capitals."""
    text = node.args[0]
    operands = factors(node)
    if not isinstance(text, str) or len(operands) != 2 or text.count("->") != 1:
        raise RefusedError(Reason.UNKNOWN_FORM, f"einsum {text!r}")
    text = text.replace(" ", "")
    inputs, result = text.split("->")
    parts = inputs.split(",")
    if len(parts) != 2:
        raise RefusedError(Reason.UNKNOWN_FORM, f"einsum {text!r}")
    left, right = parts
    if "..." in text:
        left_dims, right_dims = (fake_value(operand).dim() for operand in operands)
        spare = left_dims - len(left.replace("...", ""))
        if right_dims - len(right.replace("...", "")) != spare or "..." not in result:
            raise RefusedError(Reason.UNKNOWN_FORM, f"einsum {text!r}")
        batch = "ABCDEFGH"[:spare]
        left, right, result = (t.replace("...", batch) for t in (left, right, result))
    if any(len(set(t)) != len(t) for t in (left, right, result)):
        raise RefusedError(Reason.UNKNOWN_FORM, f"einsum {text!r}")
    return left, right, result


def _ordered(operand: Any, letters: str, wanted: str) -> Operand:
    """An operand with its dimensions in the wanted order."""
    if letters == wanted:
        return Operand(operand)
    return Operand(operand).then(torch.permute, [letters.index(letter) for letter in wanted])


def _einsum_scores(node: fx.Node) -> Scores:
    left, right, result = _equation(node)
    batch, q_letter, k_letter = result[:-2], result[-2], result[-1]
    summed = (set(left) & set(right)) - set(result)
    first, second = factors(node)
    if q_letter in right:  # the keys are written first
        left, right, first, second = right, left, second, first
    if len(summed) == 1:
        (channel,) = summed
        if set(left) == {*batch, q_letter, channel} and set(right) == {*batch, k_letter, channel}:
            return Scores(
                _ordered(first, left, batch + q_letter + channel),
                _ordered(second, right, batch + k_letter + channel),
            )
    raise RefusedError(Reason.UNKNOWN_FORM, f"einsum {node.args[0]!r} as the first product")


def _einsum_weighted(node: fx.Node, value: Any) -> Weighted:
    left, right, result = _equation(node)
    batch, q_letter, k_letter = left[:-2], left[-2], left[-1]
    channels = set(right) - set(left)
    if len(channels) == 1:
        (channel,) = channels
        natural = batch + q_letter + channel
        if set(right) == {*batch, k_letter, channel} and set(result) == set(natural):
            views: tuple[View, ...] = ()
            if result != natural:
                views = ((torch.permute, ([natural.index(letter) for letter in result],)),)
            return Weighted(_ordered(value, right, batch + k_letter + channel), views)
    raise RefusedError(Reason.UNKNOWN_FORM, f"einsum {node.args[0]!r} as the second product")
