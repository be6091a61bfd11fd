"""The model under a backend of its own, whose decisions change between calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cef_compile.backend import Backend
from cef_compile.calibrate.checkpoint import MeasuredCall
from cef_compile.calibrate.watch import (
    Key,
    Watch,
    float_tensors,
    intercepted,
    norm,
    read_error,
    relative_error,
)
from cef_compile.policy import Candidate, Decision, NodeEntry, Uniform

SAME_NORM = 0.01
"""Outputs whose norms differ by more than this part of them are of different runs. Much more than
the rounding of any dtype, and less than another seed or prompt changes."""


@dataclass
class Target:
    """What is being calibrated, once the first call has shown it."""

    model: str = ""
    entries: tuple[NodeEntry, ...] | None = None

    @property
    def filtered(self) -> list[NodeEntry]:
        """The nodes that can be filtered."""
        assert self.entries is not None, "known after the first call"
        return [entry for entry in self.entries if entry.filtered]


class Lab:
    """The model under a backend of its own, whose decisions change between calls."""

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[Backend], object],
        min_kv_len: int | None,
        grid: tuple[int, int, int] | None,
        progress: bool,
    ) -> None:
        self.model = model
        self.target = Target()
        self.progress = progress
        self._run = run
        self._watch = Watch()
        # Which nodes can be filtered at all, is Uniform's to say.
        self._backend = Backend(Uniform(1.0), self._watch.compile, False, min_kv_len, grid=grid)
        self._watch.backend = self._backend
        self._compiled = torch.compile(model.forward, backend=self._backend)

    @property
    def noise_level(self) -> float | None:
        """As the run has set it."""
        return self._backend.noise_level

    @torch.no_grad()
    def run(self, on_call: Callable[[ModelCall], None]) -> None:
        """Run once; every call of the model is answered densely, after ``on_call`` has seen it."""

        def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = ModelCall(self, args, kwargs)
            on_call(call)
            return call.output

        self._backend.set_noise_level(None)
        with intercepted(self.model, answer):
            self._run(self._backend)

    def dense(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's answer without filtering."""
        with self._backend.dense():
            output = self._compiled(*args, **kwargs)
        if self.target.entries is None:
            frozen = self._backend.frozen_policy()
            self.target = Target(frozen.model, frozen.nodes)
            if not self.target.filtered:
                raise ValueError(
                    "no attention node of this model can be filtered at these sizes;"
                    " cef_compile.explain(model, *args) says why"
                )
        return output

    def filtered(
        self,
        decisions: Mapping[Key, Decision],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        compare: bool,
    ) -> tuple[Any, dict[Key, Tensor], dict[Key, Tensor]]:
        """The model's answer, and densities and errors of the filtered nodes."""
        self._backend.set_policy(lambda node: decisions.get(node.key))
        self._watch.forget()
        self._watch.compare = compare
        output = self._compiled(*args, **kwargs)
        return output, dict(self._watch.densities), dict(self._watch.errors)


class ModelCall:
    """One call of the model, which may be repeated."""

    def __init__(self, lab: Lab, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._lab, self._args, self._kwargs = lab, args, kwargs
        self.noise_level = lab.noise_level
        self.output = lab.dense(args, kwargs)
        self._dense = float_tensors(self.output)
        if not self._dense:
            raise ValueError("the model's output holds no floating-point tensor")

    @property
    def norm(self) -> float:
        """Norm of the dense output."""
        return read_error(norm(self._dense), "the dense output")

    def check_repeatable(self, max_error: float) -> None:
        """Call once more, densely.

        Raises:
            ValueError: the answer is another one.
        """
        again = float_tensors(self._lab.dense(self._args, self._kwargs))
        error = read_error(relative_error(again, self._dense), "a second dense call")
        if error > max_error / 10:
            raise ValueError(
                f"the model answers the same inputs differently (relative difference {error:.2g}):"
                " it needs to be in eval mode, and to keep nothing from one call to the next"
            )

    def try_one(self, entry: NodeEntry, recall: float) -> Candidate:
        """One node filtered, the others dense."""
        decisions = {entry.key: Decision(recall)}
        output, densities, errors = self._lab.filtered(decisions, self._args, self._kwargs, True)
        return Candidate(
            recall=recall,
            output_error=self._error(output, f"{entry} at recall {recall:g}"),
            attention_error=read_error(errors[entry.key], f"the attention of {entry}"),
            density=float(densities[entry.key]),
        )

    def try_all(self, decisions: Mapping[Key, Decision]) -> tuple[float, dict[Key, float]]:
        """Many nodes filtered: the error and the densities."""
        output, densities, _ = self._lab.filtered(decisions, self._args, self._kwargs, False)
        keys = list(densities)
        read = torch.stack([densities[key] for key in keys]).tolist() if keys else []
        return self._error(output, "a whole policy"), dict(zip(keys, read, strict=True))

    def _error(self, output: Any, what: str) -> float:
        return read_error(relative_error(float_tensors(output), self._dense), what)


def check_repeats(call: ModelCall, first: MeasuredCall, number: int) -> None:
    """Whether a call is the one that was measured before.

    Raises:
        ValueError: it is at another noise level, or its dense output has another norm.
    """
    now = call.norm
    if call.noise_level != first.noise_level or abs(now - first.norm) > SAME_NORM * first.norm:
        raise ValueError(
            f"call {number + 1} of run is another than before: noise level {call.noise_level} and"
            f" output norm {now:.6g}, then {first.noise_level} and {first.norm:.6g}. run must do"
            " the same each time, with the same seed"
        )
