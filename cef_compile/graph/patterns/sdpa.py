"""``scaled_dot_product_attention``, the form of nearly all models of today.

As the builtin (the same object as ``torch.nn.functional.scaled_dot_product_attention``), as the
aten packet or as its overload. Arguments are bound by name, since a matcher that binds by position
has dropped masks silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from cef_compile.graph.patterns import masks
from cef_compile.graph.patterns.match import Match, Operand

TARGETS: tuple[Callable[..., Any], ...] = (
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
DEFAULTS: dict[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
"""SDPA's parameters in the order in which they may be passed by position."""


def bind(node: fx.Node) -> dict[str, Any]:
    """SDPA's arguments by name, whichever way they were passed."""
    arguments = dict(DEFAULTS)
    arguments.update(zip(DEFAULTS, node.args, strict=False))
    arguments.update(node.kwargs)
    return arguments


def match(node: fx.Node) -> Match | None:
    """The attention of an SDPA call."""
    if node.op != "call_function" or node.target not in TARGETS:
        return None
    arguments = bind(node)
    mask, rows = masks.split(arguments["attn_mask"])
    return Match(
        result=node,
        form="sdpa",
        query=Operand(arguments["query"]),
        key=Operand(arguments["key"]),
        value=Operand(arguments["value"]),
        mask=mask,
        rows=rows,
        scale=arguments["scale"],
        is_causal=arguments["is_causal"],
        dropout_p=arguments["dropout_p"],
        enable_gqa=arguments["enable_gqa"],
    )
