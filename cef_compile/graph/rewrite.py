"""Swap ``cef::attention`` in for chosen attention nodes.

The rewritten graph takes two more inputs for each of them, its control (a tensor: recall,
threshold) and its phase (a symbolic integer: dense, filtered, audited), and returns two more
outputs, its histogram and its measures. So a policy's numbers reach a graph that several layers
share, and none of them changing costs a recompile.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from cef_compile.graph.axes import Axis
from cef_compile.graph.find import Site
from cef_compile.graph.layout import Segment
from cef_compile.graph.patterns.calls import call_name, fake_value, mutates
from cef_compile.policy import Decision


@dataclass(frozen=True)
class Rewritten:
    """A graph with filtered attention in it.

    Attributes:
        module: takes the inputs of the original, then a control for each filtered node, then a
            phase for each; returns the outputs of the original, then a histogram for each, then
            measures for each.
        example_inputs: of all of them.
        outputs: number of outputs of the original.
    """

    module: fx.GraphModule
    example_inputs: list[Any]
    outputs: int


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    chosen: Sequence[tuple[Site, Decision]],
    controls: Sequence[torch.Tensor],
    phase: int,
) -> Rewritten:
    """A copy of ``gm`` with the chosen sites filtered; ``gm`` itself is not touched.

    Args:
        gm: graph from Dynamo.
        example_inputs: its inputs, as Dynamo passes them to a backend.
        chosen: sites and the decisions whose variant is compiled in.
        controls: one example control for each site, on its device.
        phase: an example phase.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    end = graph.output(graph.graph_copy(gm.graph, copies))
    outputs = len(end.args[0])
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source

    # That of the graph's own values; the tracing context has another one by now.
    fake_mode = fake_value(chosen[0][0].fx_node).fake_mode
    phases = [_symbolic(fake_mode, int(phase), f"cef_phase_{i}") for i in range(len(chosen))]
    control_inputs = [
        _input(graph, f"cef_control_{i}", fake_mode.from_tensor(control, static_shapes=True))
        for i, control in enumerate(controls)
    ]
    phase_inputs = [_input(graph, f"cef_phase_{i}", value) for i, value in enumerate(phases)]

    replacements = [
        _replace(graph, copies[site.fx_node], site, decision, copies, inputs, fake_mode)
        for (site, decision), inputs in zip(
            chosen, zip(control_inputs, phase_inputs, strict=True), strict=True
        )
    ]
    histograms = [histogram for histogram, _ in replacements]
    measures = [measured for _, measured in replacements]
    end.args = ((*end.args[0], *histograms, *measures),)

    module = fx.GraphModule(gm, graph)
    module.meta = dict(gm.meta)
    for name in _DYNAMO_ATTRIBUTES:
        if hasattr(gm, name):
            setattr(module, name, getattr(gm, name))
    return Rewritten(module, [*example_inputs, *controls, *phases], outputs)


_DYNAMO_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason")
"""What Dynamo hangs on a graph module for the compilers behind it."""


def _symbolic(fake_mode: FakeTensorMode, value: int, name: str) -> int | torch.SymInt:
    """A symbolic integer that nothing specialises: not on 0 and 1, not on an equal size."""
    # Not at the top: these import Triton, which `import cef_compile` must not.
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    assert fake_mode.shape_env is not None, "Dynamo's fake mode has a shape environment"
    return fake_mode.shape_env.create_unspecified_symint_and_symbol(
        value, ConstantSource(name), DimDynamic.DYNAMIC
    )


def _input(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    """A new last input. It has no source in the user's code, which None tells AOTAutograd."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(first):
        node = graph.placeholder(name)
    node.meta["example_value"] = value
    node._dynamo_source = None
    return node


def _replace(
    graph: fx.Graph,
    old: fx.Node,
    site: Site,
    decision: Decision,
    copies: dict[fx.Node, fx.Node],
    inputs: tuple[fx.Node, fx.Node],
    fake_mode: FakeTensorMode,
) -> tuple[fx.Node, fx.Node]:
    """Put the op in place of one attention; returns the nodes of its histogram and measures."""

    def emit(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta.update({key: old.meta[key] for key in _PROVENANCE if key in old.meta})
        with fake_mode:
            values = fx.map_arg(args, fake_value)
            node.meta["example_value"] = target(*values)
        return node

    def tensor(name: str) -> Any:
        argument = fx.map_arg(site.arguments[name], copies.__getitem__)
        if argument is None:
            return None
        for function, args in site.views.get(name, ()):
            argument = emit(function, argument, *args)
        if name in ("attn_mask", "rows") or fake_value(argument).dtype == site.node.dtype:
            return argument
        # Under autocast the casts happen inside SDPA, where the op has none.
        return emit(torch.ops.aten.to.dtype, argument, site.node.dtype)

    # A number from here on: of a symbolic one Dynamo guards the value.
    scale = float(site.node.head_dim) ** -0.5 if site.scale is None else float(site.scale)

    def size(axis: Axis | int) -> Any:
        if isinstance(axis, int) or isinstance(axis.size, int):
            return axis if isinstance(axis, int) else axis.size
        assert axis.node is not None, "an order has known axes"
        return emit(torch.ops.aten.sym_size.int, copies[axis.node], axis.dim)

    def combined(function: Callable[[Any, Any], Any], parts: Iterable[Any]) -> Any:
        """Sum or product; of numbers as a number, else as a node of the graph."""
        total, *rest = parts
        for part in rest:
            numbers = isinstance(total, int) and isinstance(part, int)
            total = function(total, part) if numbers else emit(function, total, part)
        return total

    def tokens(segments: Sequence[Segment]) -> Any:
        parts = (combined(operator.mul, map(size, segment.part)) for segment in segments)
        return combined(operator.add, [0, *parts])

    def layout() -> list[Any]:
        """The op's layout: text before, frames, height, width, text after."""
        found = site.layout
        if found is None or not found.matters or decision.order == "raster":
            return []
        start, end = found.main
        main = found.segments[start:end]
        grid = main[0].grid if len(main) == 1 else None
        middle = [1, 1, tokens(main)] if grid is None else [size(axis) for axis in grid]
        return [tokens(found.segments[:start]), *middle, tokens(found.segments[end:])]

    with graph.inserting_before(old):
        call = emit(
            torch.ops.cef.attention.default,
            *(tensor(name) for name in ("query", "key", "value", "attn_mask")),
            *inputs,
            scale,
            *decision.options,
            layout(),
        )
        out, histogram, measured = (emit(operator.getitem, call, i) for i in range(3))
        rows = tensor("rows")
        if rows is not None:
            out = emit(torch.ops.aten.where.ScalarOther, rows, out, 0.0)
        for function, args in site.views.get("result", ()):
            out = emit(function, out, *args)
        if _is_viewed(old) and fake_value(old).is_contiguous():
            out = emit(torch.ops.aten.contiguous.default, out)
    out.meta = {**old.meta, "example_value": fake_value(out)}
    old.replace_all_uses_with(out)
    _erase_unused(graph, {old} | {copies[node] for node in site.absorbed})
    return histogram, measured


def _erase_unused(graph: fx.Graph, absorbed: set[fx.Node]) -> None:
    """Erase absorbed nodes, and what only they looked at, wherever nobody else uses it."""
    candidates = set(absorbed)
    for node in reversed(graph.nodes):
        if node not in candidates or node.users:
            continue
        if node in absorbed or (call_name(node) and not mutates(node)):
            candidates.update(node.all_input_nodes)
            graph.erase_node(node)


def _is_viewed(node: fx.Node) -> bool:
    """Whether a value is looked at in a way that depends on its strides, directly or not."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user.target in _STRIDED:
                return True
            if user not in seen and call_name(user) in ("view", "transpose", "permute"):
                seen.add(user)
                todo.append(user)
    return False


_STRIDED = ("view", "view_as", "as_strided", torch.as_strided, torch.ops.aten.view.default)
_PROVENANCE = ("nn_module_stack", "source_fn_stack", "stack_trace")
"""Metadata that says which line of the model a node came from."""
