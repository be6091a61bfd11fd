"""What the tests of the patterns share: compiling a function, and saying what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import cef_compile
from cef_compile import Reason
from cef_compile.graph.patterns.calls import call_name

LENGTH = 150
"""Three key tiles, the last of them short, and two query tiles."""


def heads(length: int = LENGTH, *, batch: int = 2, count: int = 2, dim: int = 8, seed: int = 0):
    """Random ``[batch, count, length, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, length, dim, generator=generator)


def qkv(**options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values."""
    return tuple(heads(seed=seed, **options) for seed in range(3))


@dataclass
class Compiled:
    """What a backend made of a function.

    Attributes:
        node: the one node in its report.
        given, passed_on: the graph from Dynamo, and the one that the inner compiler got.
        names: the operations of the latter, by :func:`call_name`.
    """

    node: cef_compile.ReportedNode
    given: torch.fx.GraphModule
    passed_on: torch.fx.GraphModule

    @property
    def names(self) -> list[str]:
        return [call_name(node) for node in self.passed_on.graph.nodes]


@torch.no_grad()
def compile_at_recall_1(
    function: Callable[..., Any], *args: Any, tolerance: float = 1e-5, **options: Any
) -> Compiled:
    """Compile, compare with eager, and look at what was done."""
    torch._dynamo.reset()
    given, passed_on = [], []

    def inner(gm, example_inputs):
        passed_on.append(gm)
        gm.graph.lint()
        return gm.forward

    backend = cef_compile.backend(policy=lambda node: 1.0, inner=inner, min_kv_len=0)

    def spy(gm, example_inputs):
        given.append(gm)
        return backend(gm, example_inputs)

    expected = function(*(a.clone() if torch.is_tensor(a) else a for a in args))
    got = torch.compile(function, backend=spy, **options)(*args)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    (node,) = backend.report.nodes
    (before,), (after,) = given, passed_on
    return Compiled(node, before, after)


def assert_taken(function: Callable[..., Any], *args: Any, **options: Any) -> Compiled:
    """The whole attention becomes one op, and nothing of it stays behind."""
    compiled = compile_at_recall_1(function, *args, **options)
    assert compiled.node.decision == "filtered", compiled.node.reason + compiled.node.detail
    assert compiled.node.density == 1.0
    left = {"softmax", "matmul", "bmm", "baddbmm", "einsum", "dropout", "empty"}
    assert not left & set(compiled.names)
    targets = [node.target for node in compiled.passed_on.graph.nodes]
    assert targets.count(torch.ops.cef.attention.default) == 1
    return compiled


def assert_refused(
    function: Callable[..., Any], *args: Any, reason: Reason, detail: str = "", **options: Any
) -> Compiled:
    """The attention is reported with a reason, and its graph is passed on as it came."""
    compiled = compile_at_recall_1(function, *args, **options)
    assert (compiled.node.decision, compiled.node.reason) == ("dense", str(reason))
    assert detail in compiled.node.detail
    assert compiled.node.detail
    assert compiled.passed_on is compiled.given
    return compiled


def attention_count(function: Callable[..., Any], *args: Any) -> int:
    """How many attentions a backend sees in a function."""
    torch._dynamo.reset()
    backend = cef_compile.backend(policy=lambda node: None, inner="eager")
    with torch.no_grad():
        torch.compile(function, backend=backend)(*args)
    return len(backend.report.nodes)
