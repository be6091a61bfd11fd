"""Euler sampling of the tiny Wan's rectified flow, with classifier-free guidance.

``x_s = (1 - s) * clip + s * noise``; the model predicts the velocity ``noise - clip``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

START: Final = 0.7
"""Noise level at which a real clip enters: coarse shapes survive, detail is up to the model."""
GUIDANCE: Final = 2.0
"""The guidance that the model was made to be sampled with."""
SHIFT: Final = 3.0
"""The schedule spends more steps on high noise: ``s' = SHIFT s / (1 + (SHIFT - 1) s)``."""

Model = Callable[..., "tuple[Tensor, ...]"]


def noise_levels(steps: int, start: float = START) -> list[float]:
    """``steps + 1`` levels from ``start`` to 0, even on the unshifted scale."""
    unshifted = start / (SHIFT - (SHIFT - 1) * start)
    even = (unshifted * (1 - i / steps) for i in range(steps + 1))
    return [SHIFT * s / (1 + (SHIFT - 1) * s) for s in even]


def add_noise(latents: Tensor, seed: int, level: float = START) -> Tensor:
    """Latents at a noise level; the noise is drawn on the CPU, so it is the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32)
    return (1 - level) * latents + level * noise.to(latents)


def euler_step(
    model: Model, latents: Tensor, text: Tensor, level: float, following: float
) -> Tensor:
    """One guided step from a noise level to the following one (two calls of the model).

    Args:
        model: ``model(hidden_states, timestep, encoder_hidden_states, return_dict=False)``.
        latents: fp32, ``[1, 48, F, h, w]``.
        text: ``[1, 8, 64]`` in the model's dtype.
        level: noise level of ``latents``, 0 to 1.
        following: noise level wanted.

    Returns:
        fp32 latents at the following level.
    """
    timestep = torch.tensor([1000 * level], device=latents.device)
    hidden = latents.to(text.dtype)
    velocity, unconditional = (
        model(hidden, timestep, condition, return_dict=False)[0].float()
        for condition in (text, torch.zeros_like(text))
    )
    guided = unconditional + GUIDANCE * (velocity - unconditional)
    return latents + (following - level) * guided


def sample(
    model: Model,
    latents: Tensor,
    text: Tensor,
    levels: Sequence[float],
    on_step: Callable[[], object] = lambda: None,
    before_step: Callable[[float], object] = lambda level: None,
) -> Tensor:
    """Step through all ``levels``, shapes as in :func:`euler_step`.

    ``before_step`` is called with the noise level of each step, ``on_step`` after it.
    """
    for level, following in pairwise(levels):
        before_step(level)
        latents = euler_step(model, latents, text, level, following)
        on_step()
    return latents
