"""Find attention nodes in a graph as Dynamo hands it to a backend.

One pattern so far: ``scaled_dot_product_attention``, as the builtin (the same object as
``torch.nn.functional.scaled_dot_product_attention``), as the aten packet or as its overload. The
matching is by hand, since a pattern matcher that binds by position has dropped masks silently.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cef_compile.graph.tokens import attention_kind
from cef_compile.policy import AttentionNode, MaskKind

SDPA_TARGETS: tuple[Callable[..., Any], ...] = (
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
SDPA_DEFAULTS: dict[str, Any] = {
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

_ROOT = re.compile(r"^[LG]\[(['\"]).*?\1\]\.?")
_MODULES = re.compile(r"\.?(?:__dict__\[['\"])?_modules(?:['\"]\])?\[['\"]([^'\"]*)['\"]\]")
_METHOD = re.compile(r"^.*__self__\.?")


@dataclass(frozen=True, eq=False)
class Site:
    """An attention call in a graph.

    Attributes:
        fx_node: the call.
        arguments: SDPA's arguments by name, defaults filled in; FX nodes or constants.
        node: what a policy is told; its path is the one in this graph.
        nested: name of the higher-order operator whose body holds the call, or None.
    """

    fx_node: fx.Node
    arguments: dict[str, Any]
    node: AttentionNode
    nested: str | None = None


def fake_value(argument: Any) -> Any:
    """The fake tensor (or symbolic number) behind an FX argument; constants as they are."""
    if not isinstance(argument, fx.Node):
        return argument
    return argument.meta.get("example_value", argument.meta.get("val"))


def bind(node: fx.Node) -> dict[str, Any]:
    """SDPA's arguments by name, whichever way they were passed."""
    arguments = dict(SDPA_DEFAULTS)
    arguments.update(zip(SDPA_DEFAULTS, node.args, strict=False))
    arguments.update(node.kwargs)
    return arguments


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that makes a call; empty where it is not known.

    Dynamo spells the way there differently from version to version, as ``L['self'].blocks.0`` or
    through ``__dict__['_modules']``; the result is that of ``named_modules()``.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return source_path(list(stack.values())[-1][0]) if stack else ""


def source_path(source: str) -> str:
    """A Dynamo source below its root as a dotted path."""
    path = _MODULES.sub(r".\1", _ROOT.sub("", source))
    return _METHOD.sub("", path).strip(".")


def mask_kind(mask: Any) -> MaskKind:
    """What an attention mask is, from its fake tensor.

    A bool mask is one of key padding when heads and queries are broadcast: of size 1, or expanded
    with stride 0.
    """
    if mask is None:
        return "none"
    if mask.dtype != torch.bool:
        return "float"
    sizes, strides = list(mask.shape), list(mask.stride())
    shared = [
        (isinstance(size, int) and size == 1) or (isinstance(stride, int) and stride == 0)
        for size, stride in zip(sizes, strides, strict=True)
    ]
    rows_and_heads = shared[-3:-1]
    return "key_padding" if rows_and_heads and all(rows_and_heads) else "bool"


def concrete(node: AttentionNode) -> AttentionNode:
    """The node with plain sizes in place of symbolic ones: their hints, or -1 where none is known.

    Reading a hint adds no guard, where comparing a symbolic size would.
    """
    return replace(
        node,
        q_shape=_hints(node.q_shape),
        k_shape=_hints(node.k_shape),
        v_shape=_hints(node.v_shape),
        q_stride=_hints(node.q_stride),
        k_stride=_hints(node.k_stride),
        v_stride=_hints(node.v_stride),
    )


def _hints(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(
        size if isinstance(size, int) else int(size.node.hint) if size.node.has_hint() else -1
        for size in sizes
    )


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """All attention calls of a graph, in order, those inside higher-order operators included."""
    calls: Counter[str] = Counter()
    sites = []
    for graph, nested in _graphs(gm, None):
        joined: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            if node.op != "call_function" or node.target not in SDPA_TARGETS:
                continue
            path = module_path(node)
            sites.append(_site(node, path, calls[path], nested, joined))
            calls[path] += 1
    return sites


def _graphs(gm: fx.GraphModule, nested: str | None) -> Iterator[tuple[fx.Graph, str | None]]:
    yield gm.graph, nested
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            yield from _graphs(child, name)


def _site(
    node: fx.Node, path: str, ordinal: int, nested: str | None, joined: dict[fx.Node, bool]
) -> Site:
    arguments = bind(node)
    q, k, v = (fake_value(arguments[name]) for name in ("query", "key", "value"))
    out = fake_value(node)
    scale = arguments["scale"]
    return Site(
        fx_node=node,
        arguments=arguments,
        nested=nested,
        node=AttentionNode(
            path=path,
            ordinal=ordinal,
            q_shape=tuple(q.shape),
            k_shape=tuple(k.shape),
            v_shape=tuple(v.shape),
            q_stride=tuple(q.stride()),
            k_stride=tuple(k.stride()),
            v_stride=tuple(v.stride()),
            dtype=out.dtype,
            device=q.device,
            scale=None if scale is None else _number(scale, unknown=math.nan),
            is_causal=bool(arguments["is_causal"]),
            dropout_p=_number(arguments["dropout_p"], unknown=math.nan),
            enable_gqa=bool(arguments["enable_gqa"]),
            mask=mask_kind(fake_value(arguments["attn_mask"])),
            kind=attention_kind(arguments["query"], arguments["key"], joined),
            requires_grad=bool(out.requires_grad),
        ),
    )


def _number(argument: Any, unknown: float) -> float:
    """A constant argument; ``unknown`` where it is computed in the graph."""
    return float(argument) if isinstance(argument, (int, float)) else unknown
