"""Attention that PyTorch keeps in one call and that is only reported.

``multi_head_attention_forward`` (what ``nn.MultiheadAttention`` calls) projects, attends and
projects again; ``flex_attention`` has scores and blocks of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from cef_compile.graph.patterns.calls import argument, call_name, fake_value
from cef_compile.graph.patterns.match import Match, Operand
from cef_compile.policy import Reason

_FLEX = "flex_attention"


def match_multi_head(node: fx.Node) -> Match | None:
    """The attention inside ``torch.nn.functional.multi_head_attention_forward``."""
    if node.op != "call_function" or node.target is not F.multi_head_attention_forward:
        return None
    heads = argument(node, 4, "num_heads")
    names = ("query", "key", "value")
    q, k, v = (_split(argument(node, i, name), heads) for i, name in enumerate(names))
    training = argument(node, 13, "training", default=True)
    return Match(
        result=_first_output(node),
        form="multi_head_attention_forward",
        query=q,
        key=k,
        value=v,
        dropout_p=argument(node, 10, "dropout_p", default=0.0) if training else 0.0,
        is_causal=bool(argument(node, 23, "is_causal", default=False)),
        problem=(Reason.MULTI_HEAD, "one call projects and attends"),
    )


def match_flex(node: fx.Node) -> Match | None:
    """The attention of a ``flex_attention`` operator."""
    target = node.target
    if not isinstance(target, torch._ops.HigherOrderOperator) or target.name() != _FLEX:
        return None
    q, k, v = (Operand(argument(node, i, name)) for i, name in enumerate(("query", "key", "value")))
    return Match(
        result=_first_output(node),
        form=_FLEX,
        query=q,
        key=k,
        value=v,
        scale=argument(node, 5, "scale"),
        enable_gqa=True,
        problem=(Reason.FLEX, "it has scores and blocks of its own"),
    )


def _split(tokens: Any, heads: int) -> Operand:
    """Tokens ``(L, B, E)`` or ``(L, E)`` as ``(B, heads, L, E / heads)``, as the call does."""
    operand = Operand(tokens)
    if fake_value(tokens).dim() == 2:
        operand = operand.then(torch.unsqueeze, 1)
    width = fake_value(tokens).shape[-1]
    return operand.then(torch.unflatten, -1, (heads, width // heads)).then(
        torch.permute, [1, 2, 0, 3]
    )


def _first_output(node: fx.Node) -> fx.Node:
    """The first of several outputs where it is taken, else the call."""
    for user in node.users:
        if call_name(user) == "view" and user.args[1:] == (0,):
            return user
    return node
