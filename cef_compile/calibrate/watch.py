"""Calls of the model while a calibration looks on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from cef_compile import ops
from cef_compile.backend import Backend
from cef_compile.ops import Phase

Key = tuple[str, int]
"""A node: path and ordinal."""


class Watch:
    """An inner compiler whose graphs run as they are, and tell what their attention did.

    Attributes:
        backend: the backend that it is the inner compiler of; set before the first call.
        compare: whether to compute filtered attention densely as well, for its error.
        densities: of the last call's filtered nodes, on their device.
        errors: of their outputs, relative to dense, if ``compare`` was on.
        graphs: how many graphs it was given.
    """

    def __init__(self) -> None:
        self.backend: Backend | None = None
        self.compare = False
        self.graphs = 0
        self.densities: dict[Key, Tensor] = {}
        self.errors: dict[Key, Tensor] = {}

    def compile(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Sequence[Any]]:
        """Run ``gm`` node by node."""
        self.graphs += 1

        def run(*args: Any) -> Sequence[Any]:
            results: Sequence[Any] = _Interpreter(gm, self).run(*args)
            return results

        return run

    def forget(self) -> None:
        """Before a call."""
        self.densities.clear()
        self.errors.clear()

    def see(self, args: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]) -> None:
        """One call of the op."""
        control, phase = args[4], args[5]
        if int(phase) == Phase.DENSE:
            return
        assert self.backend is not None, "set before the first call"
        key = self.backend.node_of(control)
        self.densities[key] = ops.density(result[2])
        if self.compare:
            dense = ops.attention(*args[:5], int(Phase.DENSE), *args[6:])[0]
            self.errors[key] = relative_error([result[0]], [dense])


class _Interpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, watch: Watch) -> None:
        super().__init__(gm)
        self._watch = watch

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is torch.ops.cef.attention.default:
            self._watch.see(args, result)
        return result


def relative_error(given: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """``|given - dense| / |dense|`` over all elements of all tensors, fp64; no synchronisation."""
    lost = [_norm(a.float() - b.float()) for a, b in zip(given, dense, strict=True)]
    return _norm(torch.stack(lost)) / norm(dense)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all elements of all tensors, fp64."""
    return _norm(torch.stack([_norm(tensor.float()) for tensor in tensors]))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def float_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output, which may be nested."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in float_tensors(part)]
    return []


def read_error(error: Tensor, what: str) -> float:
    """An error as a number; synchronises.

    Raises:
        ValueError: it is not finite.
    """
    value = float(error)
    if not math.isfinite(value):
        raise ValueError(
            f"the error of {what} is {value}: the dense output is zero throughout, or some output"
            " has NaN or infinite values"
        )
    return value


@contextmanager
def intercepted(
    model: nn.Module, handler: Callable[[tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """While the block runs, calls of ``model`` go to ``handler(args, kwargs)``."""
    own = vars(model).get("forward")  # somebody else's, for instance of a library that offloads

    def forward(*args: Any, **kwargs: Any) -> Any:
        return handler(args, kwargs)

    vars(model)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = own
