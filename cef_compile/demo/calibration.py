"""What the tiny Wan is calibrated on: a few guided steps of one of its clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from cef_compile.backend import Backend
from cef_compile.demo.data import load_clip
from cef_compile.demo.latents import unshuffle
from cef_compile.demo.sampler import add_noise, sample


def denoising(
    model: nn.Module,
    levels: Sequence[float],
    *,
    clip: int,
    frames: int,
    size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[Backend], object]:
    """The ``run`` of :func:`cef_compile.calibrate`: the clip, with noise, through ``levels``.

    Args:
        model: as from :func:`~cef_compile.demo.data.load_model`.
        levels: noise levels, the last of which is only arrived at.
        clip, frames, size: as for :func:`~cef_compile.demo.data.load_clip`.
        seed: of the noise.
        device, dtype: of the model.
    """
    video, text = load_clip(clip, frames, size)
    start = add_noise(unshuffle(video)[None], seed, levels[0]).to(device)
    text = text.to(device, dtype)

    def run(backend: Backend) -> object:
        return sample(model, start, text, levels, before_step=backend.set_noise_level)

    return run
