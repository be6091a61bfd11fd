"""What a node of a graph calls, whichever way it is spelled.

Dynamo keeps a model's own spelling: ``q @ k``, ``torch.matmul(q, k)`` and ``q.matmul(k)`` are three
targets, and a graph from torch.export has a fourth. Patterns ask for the operation instead. A
name that ends in an underscore changes its first argument in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_aten = torch.ops.aten

_SPELLINGS: dict[str, tuple[Any, ...]] = {
    "matmul": (torch.matmul, operator.matmul, _aten.matmul.default),
    "bmm": (torch.bmm, _aten.bmm.default),
    "baddbmm": (torch.baddbmm, _aten.baddbmm.default),
    "einsum": (torch.einsum, _aten.einsum.default),
    "softmax": (F.softmax, torch.softmax, torch.special.softmax, _aten.softmax.int),
    "dropout": (F.dropout, torch.dropout, _aten.dropout.default),
    "mul": (operator.mul, torch.mul, torch.multiply, _aten.mul.Tensor, _aten.mul.Scalar),
    "mul_": (operator.imul, _aten.mul_.Tensor),
    "div": (operator.truediv, torch.div, torch.divide, torch.true_divide, _aten.div.Tensor),
    "div_": (operator.itruediv, _aten.div_.Tensor),
    "add": (operator.add, torch.add, _aten.add.Tensor),
    "add_": (operator.iadd, _aten.add_.Tensor),
    "sub": (operator.sub, torch.sub, _aten.sub.Tensor),
    "and": (operator.and_, torch.logical_and, torch.bitwise_and, _aten.logical_and.default),
    "eq": (operator.eq, torch.eq, _aten.eq.Tensor),
    "order": (
        *(operator.le, operator.lt, operator.ge, operator.gt),
        *(torch.le, torch.lt, torch.ge, torch.gt, torch.tril, torch.triu),
        *(_aten.le.Tensor, _aten.lt.Tensor, _aten.ge.Tensor, _aten.gt.Tensor),
        *(_aten.le.Scalar, _aten.lt.Scalar, _aten.ge.Scalar, _aten.gt.Scalar),
        *(_aten.tril.default, _aten.triu.default),
    ),
    "not": (operator.invert, torch.logical_not, torch.bitwise_not, _aten.logical_not.default),
    "masked_fill": (torch.masked_fill, _aten.masked_fill.Scalar),
    "where": (torch.where, _aten.where.ScalarOther, _aten.where.Scalar),
    "cast": (_aten.to.dtype,),
    "contiguous": (_aten.contiguous.default,),
    "transpose": (torch.transpose, torch.swapaxes, _aten.transpose.int),
    "permute": (torch.permute, _aten.permute.default),
    "zeros": (torch.zeros, torch.zeros_like, _aten.zeros.default, _aten.zeros_like.default),
    "empty": (torch.empty, torch.empty_like, _aten.empty.memory_format),
    "arange": (torch.arange, _aten.arange.default, _aten.arange.start, _aten.arange.start_step),
    "tensor": (torch.tensor,),
    "view": (
        operator.getitem,
        torch.unsqueeze,
        torch.squeeze,
        torch.reshape,
        torch.flatten,
        torch.unflatten,
        torch.broadcast_to,
        torch.narrow,
        torch.select,
        torch.chunk,
        torch.split,
        torch.unbind,
        _aten.unsqueeze.default,
        _aten.expand.default,
        _aten.view.default,
        _aten.reshape.default,
        _aten.slice.Tensor,
        _aten.select.int,
    ),
    "repeat": (torch.repeat_interleave, torch.tile, _aten.repeat.default),
    "projection": (F.linear, torch.addmm, torch.conv1d, torch.conv2d, _aten.linear.default),
}
_METHOD_SPELLINGS: dict[str, tuple[str, ...]] = {
    "matmul": ("matmul",),
    "bmm": ("bmm",),
    "baddbmm": ("baddbmm",),
    "softmax": ("softmax",),
    "mul": ("mul", "multiply"),
    "mul_": ("mul_", "multiply_"),
    "div": ("div", "divide", "true_divide"),
    "div_": ("div_", "divide_", "true_divide_"),
    "add": ("add",),
    "add_": ("add_",),
    "sub": ("sub",),
    "and": ("logical_and", "bitwise_and"),
    "eq": ("eq", "__eq__"),  # the latter in 2.11
    "order": ("le", "lt", "ge", "gt", "tril", "triu"),
    "not": ("logical_not", "bitwise_not"),
    "masked_fill": ("masked_fill",),
    "masked_fill_": ("masked_fill_",),
    "cast": ("to", "float", "half", "bfloat16", "double", "bool", "type", "type_as"),
    "contiguous": ("contiguous", "clone"),
    "transpose": ("transpose", "swapaxes"),
    "permute": ("permute",),
    "zeros": ("new_zeros",),
    "empty": ("new_empty",),
    "view": (
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "view",
        "view_as",
        "reshape",
        "flatten",
        "unflatten",
        "narrow",
        "select",
        "chunk",
        "split",
        "unbind",
    ),
    "repeat": ("repeat", "repeat_interleave", "tile"),
}
_BY_TARGET: dict[Any, str] = {t: name for name, targets in _SPELLINGS.items() for t in targets}
_BY_METHOD: dict[str, str] = {
    method: name for name, methods in _METHOD_SPELLINGS.items() for method in methods
}
_IN_PLACE: frozenset[Callable[..., Any]] = frozenset(
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and hasattr(operator, f"__{name}__") and hasattr(operator, name[1:])
) | {operator.setitem, operator.delitem, operator.iand, operator.ior}

ALIASING = frozenset({"view", "transpose", "permute", "contiguous", "cast"})
"""Calls whose result may share memory with their first argument."""
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
"""Calls that multiply two batches of matrices."""


def fake_value(argument: Any) -> Any:
    """The fake tensor (or symbolic number) behind an FX argument; constants as they are."""
    if isinstance(argument, (list, tuple)):
        return fx.map_arg(argument, fake_value)
    if not isinstance(argument, fx.Node):
        return argument
    return argument.meta.get("example_value", argument.meta.get("val"))


def call_name(node: Any) -> str:
    """The operation that a node calls, by its name in this file; empty for any other."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_function":
        if node.target is getattr:  # how Dynamo spells a property
            return "transpose" if node.args[1] == "mT" else ""
        return _BY_TARGET.get(node.target, "")
    return _BY_METHOD.get(str(node.target), "") if node.op == "call_method" else ""


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """An argument by its position or by one of its names."""
    if len(node.args) > position:
        return node.args[position]
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return default


def overload(node: fx.Node) -> torch._ops.OpOverload | None:
    """The op that a node calls; of several overloads the default one."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, "default", None)
    is_op = node.op == "call_function" and isinstance(target, torch._ops.OpOverload)
    return target if is_op else None


def schema_arguments(node: fx.Node, target: torch._ops.OpOverload) -> dict[str, Any]:
    """All arguments of an op by the names in its schema, defaults included."""
    given = {}
    for i, parameter in enumerate(target._schema.arguments):
        default = parameter.default_value if parameter.has_default_value() else None
        given[parameter.name] = argument(node, i, parameter.name, default=default)
    return given


def is_number(value: Any) -> bool:
    """Whether an argument is a number known when compiling."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def transposition(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function and the other arguments of a "transpose" or "permute" node."""
    if node.target is getattr:
        return torch.transpose, (-2, -1)
    rest = (*node.args[1:], *node.kwargs.values())
    if call_name(node) == "transpose":
        return torch.transpose, rest
    dims = rest[0] if isinstance(rest[0], (list, tuple)) else rest
    return torch.permute, (list(dims),)


def mutates(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments in place."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return False
    if node.target in _IN_PLACE or node.kwargs.get("inplace") is True:
        return True
    if node.kwargs.get("out") is not None:
        return True
    if node.target is F.dropout:
        return node.args[3:] == (True,)
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") and name[0] != "_" and not hasattr(operator, name)
