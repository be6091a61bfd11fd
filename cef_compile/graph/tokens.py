"""What the graph tells of an attention's tokens: which sequences queries and keys come from.

Equal lengths do not prove self attention and unequal ones do not disprove it, so queries and keys
are followed back to the activations that they were projected from, and those to where sequences
were joined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cef_compile.graph.patterns import same
from cef_compile.graph.patterns.calls import call_name, fake_value
from cef_compile.policy import Kind

_PROJECTIONS = frozenset(
    {
        torch._C._nn.linear,
        torch.addmm,
        torch.ops.aten.linear.default,
        torch.ops.aten.addmm.default,
        torch.conv1d,
        torch.conv2d,
    }
)
_ADDMM = (torch.addmm, torch.ops.aten.addmm.default)
_JOINS = frozenset(
    {torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default, torch.hstack}
)


def attention_kind(
    query: Any, key: Any, memo: dict[fx.Node, bool], lengths: tuple[Any, Any]
) -> Kind:
    """Whether an attention is of a sequence to itself, across, or of joined sequences.

    Args:
        query, key: FX nodes of q and k, in any layout.
        memo: filled here and reused for other attentions of the graph.
        lengths: number of queries and of keys.
    """
    q_sources, k_sources = _sources(query), _sources(key)
    if not any(_is_projected(node) for node in (query, key)):
        # Nothing to go by but the lengths: q and k are inputs of the graph.
        return "self" if same(*lengths) else "cross"
    if not q_sources & k_sources:
        return "cross"
    if q_sources != k_sources:
        return "joint"
    joined = any(_has_join(source, memo) for source in q_sources)
    return "joint" if joined or len(k_sources) > 1 else "self"


def _length(node: Any) -> Any:
    fake = fake_value(node)
    return fake.shape[-2] if isinstance(fake, torch.Tensor) and fake.dim() >= 2 else None


def _projections(node: Any) -> Iterator[fx.Node]:
    """The nearest projections behind a node; graph inputs where there is none."""
    seen, todo = set(), list(node) if isinstance(node, list) else [node]
    while todo:
        current = todo.pop()
        if current in seen or not isinstance(current, fx.Node):
            continue
        seen.add(current)
        if current.op == "call_function" and current.target in _PROJECTIONS:
            yield current
        else:
            todo.extend(current.all_input_nodes)


def _is_projected(node: Any) -> bool:
    return any(True for _ in _projections(node))


def _sources(node: Any) -> frozenset[fx.Node]:
    """The activations that a query or key was projected from.

    Only projections of token sequences count: rotary tables and modulations are computed from
    positions and time steps, and have another length or come without a projection.
    """
    found = set()
    for projection in _projections(node):
        source = _unsharded(_input_of(projection))
        if isinstance(source, fx.Node) and isinstance(fake_value(source), torch.Tensor):
            found.add(source)
    sequences = {source for source in found if fake_value(source).dim() >= 3}
    return frozenset(sequences or found)


def _input_of(projection: fx.Node) -> Any:
    """What a projection is applied to.

    Of one that only follows another, as an adapter's second factor does, what the first is.
    """
    given = projection.args[1 if projection.target in _ADDMM else 0]
    source = given
    while isinstance(source, fx.Node):
        if source.op == "call_function" and source.target in _PROJECTIONS:
            return _input_of(source)
        if call_name(source) not in ("cast", "dropout", "contiguous") or not source.args:
            break
        source = source.args[0]
    return given


def _unsharded(source: Any) -> Any:
    """What tensor parallelism makes each projection's own DTensor from."""
    while isinstance(source, fx.Node) and _is_sharded(source) and source.args:
        if _is_sharded(source.args[0]) and source.target != "redistribute":
            break
        source = source.args[0]
    return source


def _is_sharded(node: Any) -> bool:
    return bool(is_traceable_wrapper_subclass(fake_value(node)))


def _has_join(source: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether token sequences were joined on the way to ``source``.

    Follows the nodes that carry as many tokens as ``source`` does, back through earlier blocks.
    """
    tokens = _length(source)
    seen, todo = set(), [source]
    answer = False
    while todo and not answer:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in memo:
            answer = memo[current]
        elif same(_length(current), tokens):
            answer = _joins_tokens(current)
            todo.extend(current.all_input_nodes)
    memo[source] = answer
    return answer


def _joins_tokens(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _JOINS or not node.args:
        return False
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)):
        return False
    lengths = [_length(part) for part in parts]
    return len(lengths) > 1 and not all(same(length, _length(node)) for length in lengths)
