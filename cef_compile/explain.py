"""What a backend would do with a model, without compiling it or computing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cef_compile.backend import backend
from cef_compile.policy import PolicyLike
from cef_compile.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    recall: float | None = None,
    policy: PolicyLike | None = None,
    min_kv_len: int | None = None,
    grid: tuple[int, int, int] | None = None,
    **kwargs: Any,
) -> Report:
    """The report that a backend with these settings would give of this call.

    The model is traced, not compiled, and no kernel runs: every graph is answered with zeros of
    the right shapes. Parameters and inputs may be on the meta device. It is seen as at inference,
    without gradients, and at noise level 0. Code between graphs (after a graph break) does run, on
    those zeros.

    Args:
        model: a module or function.
        args, kwargs: what it is called with.
        recall, policy, min_kv_len, grid: as for :func:`cef_compile.backend`.

    Raises:
        TypeError, ValueError: as for :func:`cef_compile.backend`.
    """
    chosen = backend(
        recall, policy=policy, inner=_answer_with_zeros, min_kv_len=min_kv_len, grid=grid
    )
    chosen.set_noise_level(0.0)
    with torch.no_grad():
        torch.compile(model, backend=chosen, dynamic=False)(*args, **kwargs)
    chosen.reset()  # the zeros have left traces that no call has earned
    return chosen.report


def _answer_with_zeros(
    gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., tuple[Any, ...]]:
    """An inner compiler whose graphs compute nothing."""
    (outputs,) = next(node for node in gm.graph.nodes if node.op == "output").args
    values = [node.meta["example_value"] if isinstance(node, fx.Node) else node for node in outputs]

    def run(*args: Any) -> tuple[Any, ...]:
        return tuple(_zeros(value) if isinstance(value, Tensor) else value for value in values)

    return run


def _zeros(fake: Tensor) -> Tensor:
    real = torch.empty_strided(
        tuple(fake.shape), tuple(fake.stride()), dtype=fake.dtype, device=fake.device
    )
    return real.zero_()
