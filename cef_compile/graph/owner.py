"""Whose graph is it: the model and the layer behind a compiled graph.

Under regional compilation one graph serves all layers of a class, and its own paths say only
``attn1``; which layer a call is for can be told from its parameters alone. Where a piece of a
forward holds no parameter, as between graph breaks, it is the module that is running that says so.
Either is looked for in the modules whose ``forward`` is running, at the first call with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FrameType

import torch
from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Owner:
    """A compiled module and the model that it is a layer of.

    Attributes:
        model: the model; None where it could not be found.
        prefix: path of the compiled module in the model; empty if it is the model.
        siblings: paths of all modules of the same class in the model, which may share the graph;
            just ``prefix`` for a whole model.
        module: the compiled module.
    """

    model: nn.Module | None
    prefix: str
    siblings: tuple[str, ...]
    module: nn.Module | None = None


NO_OWNER = Owner(None, "", ("",))


def find_owner(parameter: torch.Tensor, local_name: str) -> Owner:
    """The layer and model that ``parameter`` belongs to, from the calls now running.

    A compiled module counts as a layer of the model around it when it sits in a ``ModuleList`` (or
    Sequential, ModuleDict) there. Else it is a part of the module that was compiled as a whole, as
    after a graph break, or a model itself, whoever calls it.

    Args:
        parameter: a parameter of the compiled module.
        local_name: its name below that module.
    """
    for outer in _outermost_first():
        for full_name, candidate in outer.named_parameters():
            if candidate is parameter:
                if full_name != local_name and not full_name.endswith("." + local_name):
                    return NO_OWNER
                return _at(outer, full_name.removesuffix(local_name).strip("."))
    return NO_OWNER


def find_place(module: nn.Module) -> Owner:
    """The model that a running module belongs to, and where it is there.

    Siblings are only those that have the same role, as ``blocks.0.attn1`` and ``blocks.1.attn1``.
    """
    for outer in _outermost_first():
        path = _path(outer, module)
        if path is not None:
            owner = _at(outer, path)
            role = _role(owner.prefix)
            same = tuple(name for name in owner.siblings if _role(name) == role)
            return replace(owner, siblings=same)
    return NO_OWNER


def running_module() -> nn.Module | None:
    """The innermost module that is running; None where there is none."""
    return next(_running(), None)


def compiled_module() -> nn.Module | None:
    """The innermost running module that was compiled as a whole; None where there is none.

    Of a wrapper that has nothing but its ``module``, as of data parallelism, it is that.
    """
    # Not at the top: it is slow to import, and loaded by the time that anything is compiled.
    from torch._dynamo.eval_frame import OptimizedModule

    for module in _running():
        if isinstance(module, OptimizedModule):
            return _unwrapped(module._orig_mod)
        if module._compiled_call_impl is not None:
            return _unwrapped(module)
    return None


def _unwrapped(module: nn.Module) -> nn.Module:
    while [name for name, _ in module.named_children()] == ["module"]:
        module = module.get_submodule("module")
    return module


def _running() -> Iterator[nn.Module]:
    """Modules whose methods are on the call stack, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, nn.Module):
            yield candidate
        frame = frame.f_back


def _outermost_first() -> list[nn.Module]:
    found = {id(module): module for module in _running()}
    return list(found.values())[::-1]


def _at(outer: nn.Module, path: str) -> Owner:
    """The owner of a module at a path."""
    steps = [step for step in path.split(".") if step]
    module, parents = outer, []
    for step in steps:
        parents.append(module)
        module = module.get_submodule(step)
    for depth, parent in enumerate(parents):
        if isinstance(parent, _CONTAINERS):
            # The model is what holds the first container on the way to the layer.
            model = parents[depth - 1] if depth else parent
            prefix = ".".join(steps[max(depth - 1, 0) :])
            siblings = (n for n, m in model.named_modules() if type(m) is type(module))
            return Owner(model, prefix, tuple(siblings), module)
    root = compiled_module()
    place = None if root is None else _path(root, module)
    if place is None:
        return Owner(module, "", ("",), module)
    return Owner(root, place, (place,), module)


def _path(outer: nn.Module, module: nn.Module) -> str | None:
    """Path of a module in another; None where it is not there."""
    return next((path for path, inner in outer.named_modules() if inner is module), None)


def _role(path: str) -> list[str]:
    """A path without the numbers of layers."""
    return ["" if step.isdigit() else step for step in path.split(".")]
