"""Whose graph is it: the model and the layer behind a parameter that a graph was called with.

Under regional compilation one graph serves all layers of a class, and its own paths say only
``attn1``; which layer a call is for can be told from its parameters alone. The model that holds a
parameter is found among the modules whose ``forward`` is running, at the first call with it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn
from torch.fx import GraphModule

from cef_compile.graph.find import source_path

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class Owner:
    """A compiled module and the model that it is a layer of.

    Attributes:
        model: the model; None where it could not be found.
        prefix: path of the compiled module in the model; empty if it is the model.
        siblings: paths of all modules of the same class in the model, which may share the graph;
            just ``prefix`` for a whole model.
    """

    model: nn.Module | None
    prefix: str
    siblings: tuple[str, ...]


NO_OWNER = Owner(None, "", ("",))


def parameter_name(gm: GraphModule, index: int) -> str:
    """Name of the parameter behind a graph input, below the compiled module; empty if unknown."""
    placeholder = [node for node in gm.graph.nodes if node.op == "placeholder"][index]
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    # A method in 2.11 and a property since 2.12.
    name = source.name() if callable(source.name) else source.name
    return source_path(name.replace("._parameters[", "._modules["))


def find_owner(parameter: torch.Tensor, local_name: str) -> Owner:
    """The layer and model that ``parameter`` belongs to, from the calls now running.

    A compiled module counts as a layer of the model around it when it sits in a ``ModuleList`` (or
    Sequential, ModuleDict) there; else it is a model itself, whoever calls it.

    Args:
        parameter: a parameter of the compiled module.
        local_name: its name below that module.
    """
    for outer in _running_modules():
        for full_name, candidate in outer.named_parameters():
            if candidate is parameter:
                return _owner(outer, full_name, local_name)
    return NO_OWNER


def _running_modules() -> list[nn.Module]:
    """Modules whose methods are on the call stack, the outermost first."""
    found: dict[int, nn.Module] = {}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, nn.Module):
            found[id(candidate)] = candidate
        frame = frame.f_back
    return list(found.values())[::-1]


def _owner(outer: nn.Module, full_name: str, local_name: str) -> Owner:
    if full_name != local_name and not full_name.endswith("." + local_name):
        return NO_OWNER
    steps = full_name.removesuffix(local_name).strip(".").split(".")
    steps = [step for step in steps if step]
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
            return Owner(model, prefix, tuple(siblings))
    return Owner(module, "", ("",))
