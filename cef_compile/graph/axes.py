"""Where the axes of a graph's values come from: which were merged into one, which were joined.

Tokens of a video are made by merging the axes of a grid (``flatten``, ``reshape``) and joined with
text by ``cat``; blocks then carry the axis of the tokens along unchanged. One walk through a graph
follows every axis of every value forwards, by shapes alone: no module, no name and no
configuration of a model is looked at. What is found here decides only in which order tiles are
cut, and every order gives a right result, so that a wrong guess costs speed and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cef_compile.graph.patterns import same
from cef_compile.graph.patterns.calls import argument, call_name, fake_value, transposition
from cef_compile.graph.patterns.match import View, look

_COLLECTIVES = "_c10d_functional."
"""Beginning of the names of the ops that wait for other ranks: what they give has axes of ranks."""
_JOINS = frozenset({torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default})


@dataclass(frozen=True)
class Axis:
    """An axis of a value in the graph that cannot be traced any further.

    Attributes:
        node: the value; None where it is not known, as behind an exchange between ranks.
        dim: which of its axes.
        size: its size; symbolic where dynamic.
    """

    node: fx.Node | None
    dim: int
    size: Any


Part = tuple[Axis, ...]
"""Axes that were merged into one, the outermost first: their sizes multiply."""
Origin = tuple[Part, ...]
"""Parts that were joined one after the other: their sizes add up."""
Origins = tuple[Origin, ...]
"""The origin of each axis of a value."""


def part_size(part: Part) -> Any:
    """Number of elements of a part."""
    return math.prod(axis.size for axis in part)


def hint(size: Any) -> int:
    """A size as a plain number, without a guard; -1 where it depends on data."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else -1


def trace_axes(graph: fx.Graph) -> dict[fx.Node, Origins]:
    """The origins of the axes of every tensor in a graph."""
    found: dict[fx.Node, Origins] = {}
    for node in graph.nodes:
        fake = fake_value(node)
        if isinstance(fake, Tensor) and not fake.is_nested:
            found[node] = _origins(node, tuple(fake.shape), found)
    return found


def through(origins: Origins, fake: Tensor, views: Sequence[View]) -> Origins:
    """The origins of a value that is looked at through some views."""
    for function, args in views:
        seen = look(fake, [(function, args)])
        if function in (torch.transpose, torch.permute):
            origins = _moved(origins, function, args)
        else:
            origins = _regrouped(origins, tuple(fake.shape), tuple(seen.shape), None)
        fake = seen
    return origins


def _origins(node: fx.Node, shape: tuple[Any, ...], found: dict[fx.Node, Origins]) -> Origins:
    if str(node.target).startswith(_COLLECTIVES):
        return tuple(((Axis(None, dim, size),),) for dim, size in enumerate(shape))
    sources = [source for source in _sources(node) if source in found]
    name = call_name(node)
    if node.op not in ("call_function", "call_method") or not sources:
        return tuple(((Axis(node, dim, size),),) for dim, size in enumerate(shape))
    if name in ("transpose", "permute"):
        return _moved(found[sources[0]], *transposition(node))
    first = fake_value(sources[0])
    if name == "view" and len(sources) == 1 and same(first.numel(), math.prod(shape)):
        return _regrouped(found[sources[0]], tuple(first.shape), shape, node)
    carried = tuple(
        _carried(node, dim, size, shape, sources, found) for dim, size in enumerate(shape)
    )
    if node.target in _JOINS:
        parts: Any = argument(node, 0, "tensors")
        dim = argument(node, 1, "dim", "axis", default=0) % len(shape)
        if isinstance(parts, (list, tuple)) and all(part in found for part in parts):
            joined = tuple(one for part in parts for one in found[part][dim])
            return (*carried[:dim], joined, *carried[dim + 1 :])
    return carried


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that a value is made of; behind a tuple, those that the tuple is made of."""
    for source in node.all_input_nodes:
        fake = fake_value(source)
        if isinstance(fake, Tensor):
            yield source
        elif isinstance(fake, (list, tuple)):
            yield from (s for s in source.all_input_nodes if isinstance(fake_value(s), Tensor))


def _carried(
    node: fx.Node,
    dim: int,
    size: Any,
    shape: tuple[Any, ...],
    sources: list[fx.Node],
    found: dict[fx.Node, Origins],
) -> Origin:
    """The origin of an axis that an operation leaves alone, or cuts a joined part out of.

    It is that of an axis of equal size in the same place of an input, counted from either end; of
    several the one that was followed furthest.
    """
    own: Origin = ((Axis(node, dim, size),),)
    if isinstance(size, int) and size == 1:
        return own
    best = own
    for source in sources:
        theirs, sizes = found[source], tuple(fake_value(source).shape)
        places = {dim} if len(sizes) == len(shape) else {dim, dim + len(sizes) - len(shape)}
        for place in places:
            if not 0 <= place < len(sizes):
                continue
            if same(sizes[place], size):
                candidate = theirs[place]
            elif len(sizes) == len(shape):
                candidate = _run(theirs[place], size)
            else:
                continue
            if _detail(candidate) > _detail(best) or (best is own and candidate):
                best = candidate
    return best


def _run(origin: Origin, size: Any) -> Origin:
    """The joined parts, one after the other, that alone are of this size; nothing if none are."""
    runs = [
        origin[start:end]
        for start in range(len(origin))
        for end in range(start + 1, len(origin) + 1)
        if same(sum(map(part_size, origin[start:end])), size)
    ]
    return runs[0] if len(runs) == 1 and len(origin) > 1 else ()


def _detail(origin: Origin) -> int:
    return len(origin) + sum(map(len, origin))


def _moved(origins: Origins, function: Callable[..., Any], args: tuple[Any, ...]) -> Origins:
    """The origins of a transposed or permuted value."""
    axes = list(range(len(origins)))
    if function is torch.permute:
        return tuple(origins[axes[dim]] for dim in args[0])
    a, b = args
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(origins[axis] for axis in axes)


def _regrouped(
    origins: Origins, old: tuple[Any, ...], new: tuple[Any, ...], node: fx.Node | None
) -> Origins:
    """The origins of a reshaped value: axes are merged, split again, or stay as they are."""
    result: list[Origin] = [
        () if node is None else ((Axis(node, dim, size),),) for dim, size in enumerate(new)
    ]
    if any(hint(size) < 0 for size in (*old, *new)):
        return tuple(result)
    ins = [i for i, size in enumerate(old) if not (isinstance(size, int) and size == 1)]
    outs = [i for i, size in enumerate(new) if not (isinstance(size, int) and size == 1)]
    while ins and outs:
        taken, given = [ins.pop(0)], [outs.pop(0)]
        left, right = hint(old[taken[0]]), hint(new[given[0]])
        while left != right and (ins if left < right else outs):
            if left < right:
                taken.append(ins.pop(0))
                left *= hint(old[taken[-1]])
            else:
                given.append(outs.pop(0))
                right *= hint(new[given[-1]])
        if left != right:
            break
        if len(taken) == len(given) == 1:
            result[given[0]] = origins[taken[0]]
        elif any(axis.node is None for i in taken for part in origins[i] for axis in part):
            for dim in given:
                result[dim] = ((Axis(None, dim, new[dim]),),)
        elif all(len(origins[i]) == 1 for i in taken):
            _share(tuple(axis for i in taken for axis in origins[i][0]), given, new, result)
    return tuple(result)


def _share(part: Part, given: list[int], new: tuple[Any, ...], result: list[Origin]) -> None:
    """Give each new axis the axes that multiply to its size, as long as they do."""
    for dim in given:
        for number in range(1, len(part) + 1):
            if hint(part_size(part[:number])) == hint(new[dim]):
                result[dim], part = (part[:number],), part[number:]
                break
        else:
            return
