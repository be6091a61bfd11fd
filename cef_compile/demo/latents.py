"""Pixels to latents and back: a 4 x 4 pixel unshuffle."""

from __future__ import annotations

from torch import Tensor

from cef_compile.demo.defaults import TOKEN_PIXELS, UNSHUFFLE


def unshuffle(video: Tensor) -> Tensor:
    """``[3, F, 4h, 4w]`` pixels to ``[48, F, h, w]`` latents, any dtype."""
    colours, frames, height, width = video.shape
    u = UNSHUFFLE
    blocks = video.reshape(colours, frames, height // u, u, width // u, u)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(-1, frames, height // u, width // u)


def shuffle(latents: Tensor) -> Tensor:
    """``[48, F, h, w]`` latents to ``[3, F, 4h, 4w]`` pixels: the inverse of :func:`unshuffle`."""
    channels, frames, height, width = latents.shape
    u = UNSHUFFLE
    blocks = latents.reshape(channels // (u * u), u, u, frames, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(-1, frames, height * u, width * u)


def tokens(frames: int, size: int) -> int:
    """Length of the sequence that the model attends over, for square frames of ``size`` pixels."""
    return frames * (size // TOKEN_PIXELS) ** 2
