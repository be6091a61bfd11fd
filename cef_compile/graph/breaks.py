"""Where Dynamo did not keep a model in one graph, and what would.

Two things tell of it, and neither is global state. A graph that ends at a break carries Dynamo's
reason. A graph of a layer, where the model around it was compiled, says that the model's own
forward runs outside of graphs: Dynamo gives up a whole function where it breaks inside a loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from cef_compile.graph.owner import Owner

_HINT = re.compile(r"^\s*Hint: (.+)$", re.MULTILINE)
_SETTING = "torch._dynamo.config."
_BRANCH = "a branch on a tensor's value"
_WORDS = {
    "generic_jump": _BRANCH,
    "Data-dependent branching": _BRANCH,
    "step_unsupported": "a line that Dynamo cannot trace",
}
"""What some of Dynamo's reasons begin with, in words."""
ADVICE = (
    "If a tensor's value is read there, torch._dynamo.config.capture_scalar_outputs = True (for"
    " .item() and slices) or torch._dynamo.config.capture_dynamic_output_shape_ops = True (for"
    " nonzero and boolean indices) may keep the graph whole. TORCH_LOGS=graph_breaks prints what"
    " Dynamo met."
)
"""Where Dynamo says nothing better."""
NO_BRANCHES = "No setting of Dynamo's traces that: pass a number in place of the tensor."


@dataclass(frozen=True)
class Break:
    """An end of a graph before its model's forward was over.

    Attributes:
        place: file, line and function.
        reason: what Dynamo met there.
        remedy: what keeps the graph whole; Dynamo's own hint where it has one.
        is_explained: whether Dynamo says what it met.
    """

    place: str
    reason: str
    remedy: str
    is_explained: bool = True


def find_split(owner: Owner, around: nn.Module | None) -> Break | None:
    """That a layer has a graph of its own where the model around it was compiled.

    Args:
        owner: the layer that a graph belongs to.
        around: the module that was compiled, see :func:`compiled_module`.
    """
    if around is None or not owner.prefix or owner.module is around:
        return None
    place = f"{type(around).__name__}.forward"
    return Break(place, "its layers have graphs of their own", ADVICE, is_explained=False)


def find_break(gm: fx.GraphModule) -> Break | None:
    """The break at which a graph ends; None where it ends with its function."""
    ended: Any = getattr(gm, "compile_subgraph_reason", None)
    if not getattr(ended, "graph_break", False):
        return None
    reason, stack = str(ended.reason), list(ended.user_stack)
    first = reason.strip().splitlines()[0] if reason.strip() else "unknown"
    words = next((text for name, text in _WORDS.items() if first.startswith(name)), first)
    hints = _HINT.findall(reason)
    # A hint that names a switch is worth more than the general ones beside it.
    hints.sort(key=lambda hint: not _names_setting(hint))
    remedy = hints[0].replace("`", "").rstrip(".") + "." if hints else ADVICE
    if words == _BRANCH:
        remedy = NO_BRANCHES
    if not stack:
        return Break("unknown", words, remedy)
    frame = stack[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
    return Break(place, words, remedy)


def worth_saying(breaks: Iterable[Break]) -> list[Break]:
    """Those breaks of a model that say something new.

    Where Dynamo names a setting for one of them, that may be why the others are there.
    """
    first = {found.place: found for found in reversed(list(breaks))}
    kept = list(first.values())[::-1]
    if any(found.is_explained and _names_setting(found.remedy) for found in kept):
        return [found for found in kept if found.is_explained]
    return kept


def _names_setting(text: str) -> bool:
    return _SETTING in text and "= True" in text
