"""For pipelines of diffusers: keep the noisiest steps dense. Importing it needs no diffusers.

::

    warm_up = cef_compile.diffusers.DenseUntil(backend, sigma=0.86)
    video = pipe(prompt, callback_on_step_end=warm_up).frames
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from cef_compile.backend import Backend
from cef_compile.policy.decision import check_fraction


class DenseUntil:
    """A pipeline's ``callback_on_step_end`` that keeps attention dense while there is much noise.

    The first steps decide the composition, and filtering them costs most. The backend is dense
    from here on, so in the first step as well, which no callback precedes; it filters from the
    first step on whose noise level is at most ``sigma``. Nothing is recompiled. One object serves
    one call of a pipeline; the backend filters again when the call ends, when ``close`` is called,
    at the end of a ``with`` block, or when the object is no longer referred to.

    The noise level of a step is in [0, 1]: the share of noise of a flow-matching scheduler (its
    sigma), and ``sqrt(1 - alphas_cumprod)`` of a scheduler of the DDPM kind.

    Args:
        backend: the one that the pipeline's transformers were compiled with.
        sigma: steps with more noise than this are dense, in (0, 1]; 1 keeps none dense.

    Raises:
        TypeError: ``backend`` is no :class:`~cef_compile.Backend`, or ``sigma`` no number.
        ValueError: ``sigma`` is outside (0, 1].
    """

    def __init__(self, backend: Backend, sigma: float) -> None:
        if not isinstance(backend, Backend):
            raise TypeError(f"backend must come from cef_compile.backend(), got {backend!r}")
        self.sigma = check_fraction("sigma", sigma)
        self._stack = ExitStack()
        if self.sigma < 1:
            self._stack.enter_context(backend.dense())
        self._finished = False
        self._close = weakref.finalize(self, self._stack.close)

    def __call__(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by the pipeline after each step.

        Args:
            pipe: the pipeline, for its scheduler.
            step: number of the step.
            timestep: of the step; a number or a tensor of one element.
            callback_kwargs: returned as they are.

        Raises:
            RuntimeError: it has served a call already.
        """
        if self._finished:
            raise RuntimeError("a DenseUntil serves one call of a pipeline: make one for each call")
        following = _following(pipe.scheduler, float(timestep))
        if following is None:
            self._finished = True
        if following is None or noise_level(pipe.scheduler, following) <= self.sigma:
            self.close()
        return callback_kwargs

    def close(self) -> None:
        """Let the backend filter again."""
        self._close()

    def __enter__(self) -> DenseUntil:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def noise_level(scheduler: Any, timestep: float) -> float:
    """Noise level in [0, 1] of a time step.

    Args:
        scheduler: of diffusers; with flow matching its time steps are sigmas in units of
            ``num_train_timesteps``, else it has ``alphas_cumprod``.
        timestep: one of ``scheduler.timesteps``.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or getattr(scheduler.config, "use_flow_sigmas", False):
        return timestep / float(scheduler.config.num_train_timesteps)
    kept = float(alphas[min(round(timestep), len(alphas) - 1)])
    return float((1 - kept) ** 0.5)


def _following(scheduler: Any, timestep: float) -> float | None:
    """The time step after a given one; None after the last."""
    steps = [float(step) for step in scheduler.timesteps]
    after = steps[steps.index(timestep) + 1 :] if timestep in steps else []
    return after[0] if after else None
