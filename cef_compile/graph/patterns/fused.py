"""PyTorch's own fused attention ops, called directly: ``aten::_scaled_dot_product_*_attention``.

diffusers does so under context parallelism, for the log-sum-exp that these ops return.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from cef_compile.graph.patterns.calls import call_name, mutates, overload, schema_arguments
from cef_compile.graph.patterns.match import Match, Operand
from cef_compile.policy import Reason

PREFIX = "aten::_scaled_dot_product_"
OPS = frozenset(
    PREFIX + name
    for name in (
        "flash_attention",
        "cudnn_attention",
        "efficient_attention",
        "flash_attention_for_cpu",
        "fused_attention_overrideable",
    )
)
OUTPUT, LSE = 0, 1
"""Their first two outputs."""


def match(node: fx.Node) -> Match | None:
    """The attention of a fused op."""
    given = arguments(node)
    if given is None:
        return None
    outputs = [user for user in node.users if call_name(user) == "view"]
    result = next((user for user in outputs if user.args[1:] == (OUTPUT,)), node)
    absorbed = swallowed((node,), result)
    return Match(
        result=result,
        form=form(node),
        query=Operand(given["query"]),
        key=Operand(given["key"]),
        value=Operand(given["value"]),
        mask=Operand(given["mask"]),
        scale=given["scale"],
        is_causal=given["is_causal"],
        dropout_p=given["dropout_p"],
        absorbed=absorbed or frozenset(),
        problem=None if absorbed else (Reason.PARTIAL, "its log-sum-exp is used"),
    )


def form(node: fx.Node) -> str:
    """The op by the name of its implementation."""
    target = overload(node)
    return "" if target is None else str(target._schema.name).removeprefix(PREFIX)


def arguments(node: fx.Node) -> dict[str, Any] | None:
    """What a fused op is given, its mask under "mask"; None for any other node."""
    target = overload(node)
    if target is None or target._schema.name not in OPS:
        return None
    given = schema_arguments(node, target)
    return {**given, "mask": given.get("attn_bias", given.get("attn_mask"))}


def swallowed(ops: Iterable[fx.Node], result: fx.Node) -> frozenset[fx.Node] | None:
    """The fused ops and all that is made of them but the result; None where that is of use."""
    found: set[fx.Node] = set()
    todo = list(ops)
    while todo:
        node = todo.pop()
        if node is result or node in found:
            continue
        if node.op == "output" or mutates(node):
            return None
        found.add(node)
        todo.extend(node.users)
    return frozenset(found)
