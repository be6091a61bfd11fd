"""How the calls of one compiled graph are told apart, which may serve many layers and models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from cef_compile.graph.find import source_path
from cef_compile.graph.owner import NO_OWNER, Owner, find_owner, find_place, running_module


@dataclass(frozen=True)
class Anchor:
    """What names the layer of a call.

    Attributes:
        of: from the inputs of a call to the object that names its layer; None if nothing does.
        owner: from such an object to the layer; to be asked while the call is running.
    """

    of: Callable[[Sequence[Any]], Any]
    owner: Callable[[Any], Owner]


NOTHING = Anchor(lambda inputs: None, lambda named: NO_OWNER)
"""For a function that no module calls: all its calls are for one."""
BY_MODULE = Anchor(
    lambda inputs: running_module(),
    lambda module: NO_OWNER if module is None else find_place(module),
)
"""The module that is running."""


def _by_parameter(index: int, local_name: str) -> Anchor:
    """A parameter among the graph's inputs, by its name below the compiled module."""
    return Anchor(lambda inputs: inputs[index], lambda found: find_owner(found, local_name))


def find_anchor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Anchor:
    """What names the layers of a graph: the first input that is a named parameter, if there is one.

    To be called while Dynamo compiles, when the modules around the graph are running.
    """
    for i, value in enumerate(example_inputs):
        if isinstance(value, nn.Parameter):
            name = _parameter_name(gm, i)
            if name:
                return _by_parameter(i, name)
    return NOTHING if running_module() is None else BY_MODULE


def _parameter_name(gm: fx.GraphModule, index: int) -> str:
    """Name of the parameter behind a graph input, below the compiled module; empty if unknown."""
    placeholder = [node for node in gm.graph.nodes if node.op == "placeholder"][index]
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    # A method in 2.11 and a property since 2.12.
    name = source.name() if callable(source.name) else source.name
    return source_path(name.replace("._parameters[", "._modules["))
