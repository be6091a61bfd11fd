"""Find attention nodes in a graph as Dynamo hands it to a backend, in any form that is known.

The forms are in :mod:`cef_compile.graph.patterns`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cef_compile.graph.axes import Origin, Origins, hint, through, trace_axes
from cef_compile.graph.layout import Layout, find_layout
from cef_compile.graph.patterns import Match, Operand, View, find_matches, masks
from cef_compile.graph.patterns.calls import fake_value
from cef_compile.graph.tokens import attention_kind
from cef_compile.policy import AttentionNode, MaskKind, Reason

_ROOT = re.compile(r"^[LG]\[(['\"]).*?\1\]\.?")
_MODULES = re.compile(r"\.?(?:__dict__\[['\"])?_modules(?:['\"]\])?\[['\"]([^'\"]*)['\"]\]")
_HOOK = re.compile(r"\.?\b(?:forward|fn_ref)\b.*?__self__")
"""The detour by which a hook reaches its module: through the method that it wraps."""


@dataclass(frozen=True, eq=False)
class Site:
    """An attention in a graph.

    Attributes:
        fx_node: the node that holds its output.
        arguments: SDPA's arguments by name; FX nodes or constants. "rows" is a mask of
            queries, whose result is 0 where it is false.
        scale: factor of the scores, a number or a symbolic one; None for the usual one.
        node: what a policy is told; its path is the one in this graph.
        nested: name of the higher-order operator whose body holds the attention, or None.
        views: by argument, how to look at it to see what SDPA would be given; under "result", how
            to look at SDPA's output to see that of ``fx_node``.
        absorbed: the other nodes that compute it.
        problem: why it can only be reported; None where the op can take its place.
        layout: the sequences that its tokens are; None where queries and keys are not the same
            tokens, or nothing is known of them.
    """

    fx_node: fx.Node
    arguments: dict[str, Any]
    node: AttentionNode
    scale: Any = None
    nested: str | None = None
    views: Mapping[str, tuple[View, ...]] = field(default_factory=dict)
    absorbed: frozenset[fx.Node] = frozenset()
    problem: tuple[Reason, str] | None = None
    layout: Layout | None = None

    @property
    def place(self) -> str:
        """Path and number of the call."""
        return f"{self.node.path or '(unnamed)'}#{self.node.ordinal}"

    def laid_out(self, layout: Layout | None) -> Site:
        """This site with a layout, which its node tells the policy."""
        if layout is None:
            return replace(self, layout=None)
        sizes = layout.sizes if len(layout.sizes) > 1 else ()
        node = replace(self.node, grid=layout.grid, segments=sizes, grid_source=layout.source)
        return replace(self, layout=layout, node=node)


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
    return _HOOK.sub("", path).strip(".")


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
    grid = None
    if node.grid is not None:
        frames, height, width = node.grid
        grid = (hint(frames), hint(height), hint(width))
    return replace(
        node,
        q_shape=_hints(node.q_shape),
        k_shape=_hints(node.k_shape),
        v_shape=_hints(node.v_shape),
        q_stride=_hints(node.q_stride),
        k_stride=_hints(node.k_stride),
        v_stride=_hints(node.v_stride),
        grid=grid,
        segments=_hints(node.segments),
    )


def _hints(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(map(hint, sizes))


def _comparable(sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes with -1 for those that depend on data: comparing them fails, and policies compare."""
    return tuple(size if isinstance(size, int) or size.node.has_hint() else -1 for size in sizes)


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """All attentions of a graph, in order, those inside higher-order operators included."""
    calls: Counter[str] = Counter()
    sites = []
    for graph, nested in _graphs(gm, None):
        joined: dict[fx.Node, bool] = {}
        matches = list(find_matches(graph))
        origins = trace_axes(graph) if matches else {}
        for match in matches:
            path = module_path(match.result)
            site = _site(match, path, calls[path], nested, joined)
            sites.append(site.laid_out(_layout(match, site.node, origins)))
            calls[path] += 1
    return sites


def _layout(match: Match, node: AttentionNode, origins: Mapping[fx.Node, Origins]) -> Layout | None:
    """What the tokens of an attention are, as far as the graph shows it."""
    if len(node.q_shape) != 4 or node.kind == "cross":
        return None
    query, key = (_tokens(operand, origins) for operand in (match.query, match.key))
    return find_layout(query, key, match.query.fake.shape[-2], match.key.fake.shape[-2])


def _tokens(operand: Operand, origins: Mapping[fx.Node, Origins]) -> Origin:
    """The origin of an operand's axis of tokens; empty where there is none to follow."""
    if not isinstance(operand.source, fx.Node) or operand.source not in origins:
        return ()
    return through(origins[operand.source], fake_value(operand.source), operand.views)[-2]


def _graphs(gm: fx.GraphModule, nested: str | None) -> Iterator[tuple[fx.Graph, str | None]]:
    yield gm.graph, nested
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            yield from _graphs(child, name)


def _site(
    match: Match, path: str, ordinal: int, nested: str | None, joined: dict[fx.Node, bool]
) -> Site:
    operands = {
        "query": match.query,
        "key": match.key,
        "value": match.value,
        "attn_mask": match.mask,
        "rows": match.rows,
    }
    q, k, v, mask, _ = (operand.fake for operand in operands.values())
    kind_of_mask = mask_kind(mask)
    problem = match.problem or _subclass(q, k, v)
    if problem is None and kind_of_mask in ("bool", "float"):
        problem = Reason.MASK, f"{kind_of_mask} mask, {masks.describe(match.mask.source)}"
    out = fake_value(match.result)
    out = out[0] if isinstance(out, (list, tuple)) else out
    return Site(
        fx_node=match.result,
        arguments={name: operand.source for name, operand in operands.items()},
        scale=fake_value(match.scale),
        nested=nested,
        views={
            **{name: operand.views for name, operand in operands.items()},
            "result": match.result_views,
        },
        absorbed=match.absorbed,
        problem=problem,
        node=AttentionNode(
            path=path,
            ordinal=ordinal,
            q_shape=_comparable(q.shape),
            k_shape=_comparable(k.shape),
            v_shape=_comparable(v.shape),
            q_stride=tuple(q.stride()),
            k_stride=tuple(k.stride()),
            v_stride=tuple(v.stride()),
            dtype=out.dtype,
            device=q.device,
            scale=None if match.scale is None else _number(match.scale, unknown=math.nan),
            is_causal=bool(match.is_causal),
            dropout_p=_number(match.dropout_p, unknown=math.nan),
            enable_gqa=bool(match.enable_gqa),
            mask=kind_of_mask,
            kind=attention_kind(
                match.query.source, match.key.source, joined, (q.shape[-2], k.shape[-2])
            ),
            requires_grad=bool(out.requires_grad),
            form=match.form,
        ),
    )


def _subclass(*fakes: Any) -> tuple[Reason, str] | None:
    """The problem of inputs such as DTensors, which the op would not know how to take apart."""
    for fake in fakes:
        if is_traceable_wrapper_subclass(fake):
            return Reason.SUBCLASS, type(fake).__name__
    return None


def _number(argument: Any, unknown: float) -> float:
    """A constant argument, or the hint of one that follows from sizes; else ``unknown``."""
    value = fake_value(argument)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return float(value.node.hint) if value.node.has_hint() else unknown
    return float(value) if isinstance(value, (int, float)) else unknown
