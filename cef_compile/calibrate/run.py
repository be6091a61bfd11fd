"""The calibration: run, measure, choose, try."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from torch import nn

from cef_compile.backend import Backend
from cef_compile.calibrate.checkpoint import Checkpoint, MeasuredCall
from cef_compile.calibrate.choose import TimeModel
from cef_compile.calibrate.lab import Lab, ModelCall, check_repeats
from cef_compile.calibrate.progress import progress_bar
from cef_compile.calibrate.search import Search
from cef_compile.policy import NodePolicy, check_fraction

CANDIDATES: Final = (0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5)
"""Recalls that are tried on each node."""


def calibrate(
    model: nn.Module,
    run: Callable[[Backend], object],
    *,
    max_error: float,
    candidates: Sequence[float] = CANDIDATES,
    min_kv_len: int | None = None,
    grid: tuple[int, int, int] | None = None,
    time_model: TimeModel | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> NodePolicy:
    """A policy that is as fast as an error budget allows.

    ``run`` is called several times and must do the same each time: a few denoising steps with
    ``model``, and ``backend.set_noise_level(sigma)`` before each of them if the recalls may depend
    on the noise level. Every call of the model is answered densely, so that the steps are those of
    dense attention. In the first run each call is repeated with one node filtered at a time, for
    each of its candidates; the runs after it try whole policies. Recalls are lowered where that
    costs least error per predicted time saved.

    While it runs, calls of ``model`` are intercepted. It has to be without random state and must
    not keep anything from one call to the next, and its memory stays as for one call, run without
    an inner compiler.

    Args:
        model: in eval mode and not compiled; also the transformer of a pipeline that ``run`` calls.
        run: is given the backend that the model is measured with.
        max_error: the budget for the error of the model's output, all nodes filtered: root mean
            square over the calls of ``|filtered - dense| / |dense|``; in (0, 1].
        candidates: recalls to choose from, in (0, 1]; dense is one more.
        min_kv_len, grid: as for :func:`cef_compile.backend`.
        time_model: predicted time by density; None for one H100's.
        checkpoint: file that keeps what has been measured. If it exists, the calibration goes on
            where it was interrupted. It also serves calibrations to another budget.
        progress: show bars, if tqdm is installed.

    Returns:
        Rules for the model's nodes, by noise level where ``run`` sets it and dense above the
        highest one, with what was measured as ``.calibration``; print that. A warning is given
        where the policy is no better than Balanced at the same predicted time.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, the model is compiled already, cannot be
            calibrated (its answers vary, nothing can be filtered), or ``run`` never calls it or
            does not repeat itself, or the checkpoint is of another calibration.
        PolicyFormatError: the checkpoint is damaged.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(run):
        raise TypeError(f"run must be a function of a backend, got {type(run).__name__}")
    compiled = [name for name, part in model.named_modules() if part._compiled_call_impl]
    if compiled:
        raise ValueError(
            f"calibrate a model before it is compiled; compiled here: {compiled[0] or 'the model'}"
        )
    max_error = check_fraction("max_error", max_error)
    recalls = sorted({check_fraction("a candidate", recall) for recall in candidates}, reverse=True)
    if not recalls:
        raise ValueError("candidates is empty: give at least one recall")

    lab = Lab(model, run, min_kv_len, grid, progress)
    saved = Checkpoint(checkpoint)
    _Measuring(lab, saved, recalls, max_error).run()
    if lab.target.entries is None or not saved.calls:
        raise ValueError("run never called the model: there is nothing to measure")
    choice = Search(lab, saved.calls, time_model or TimeModel())
    return choice.policy(max_error)


class _Measuring:
    """The first run: each node and candidate by itself."""

    def __init__(
        self, lab: Lab, saved: Checkpoint, candidates: Sequence[float], max_error: float
    ) -> None:
        self._lab = lab
        self._saved = saved
        self._candidates = candidates
        self._max_error = max_error
        self._number = 0

    def run(self) -> None:
        """Measure what the checkpoint does not hold yet."""
        self._lab.run(self._on_call)
        if self._number < len(self._saved.calls):
            raise ValueError(
                f"run called the model {self._number} times, and {len(self._saved.calls)} times"
                " when the checkpoint was written: it must do the same each time"
            )

    def _on_call(self, call: ModelCall) -> None:
        entries = self._lab.target.filtered
        if self._number == 0:
            self._saved.check(self._lab.target.model, entries, self._candidates)
            call.check_repeatable(self._max_error)
        if self._number == len(self._saved.calls):
            self._saved.calls.append(MeasuredCall(call.noise_level, call.norm))
        mine = self._saved.calls[self._number]
        check_repeats(call, mine, self._number)
        if (call.noise_level is None) != (self._saved.calls[0].noise_level is None):
            raise ValueError("run sets the noise level for some calls only: set it for all or none")
        self._number += 1
        todo = entries[len(mine.nodes) :]
        with self._bar(len(todo) * len(self._candidates)) as advance:
            for entry in todo:
                found = []
                for recall in self._candidates:
                    found.append(call.try_one(entry, recall))
                    advance()
                mine.nodes.append(tuple(found))
                self._saved.write()

    def _bar(self, total: int) -> Any:
        return progress_bar(f"call {self._number}, single nodes", total, self._lab.progress)
