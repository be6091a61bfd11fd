"""Where the embedded model and clips lie, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cef_compile.demo.defaults import CLIP_PIXELS

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


def data_folder() -> Path:
    """Folder of ``tiny-wan/`` and ``clips.npz``: inside the installed package, or a checkout's."""
    package = Path(__file__).parent / "_data"
    checkout = Path(__file__).parents[2] / "examples"
    for folder in (package, checkout):
        if (folder / "clips.npz").is_file():
            return folder
    raise FileNotFoundError(f"no clips.npz in {package} or {checkout}: reinstall cef-compile")


def load_clip(clip: int, frames: int, size: int) -> tuple[Tensor, Tensor]:
    """First frames of a clip and its conditioning.

    Args:
        clip: number of the clip, 0 or 1.
        frames: how many frames, at most 16.
        size: height and width wanted, in pixels, at most 256 (reduced by area).

    Returns:
        video: fp32, ``[3, frames, size, size]``, -1 to 1.
        text: fp32, ``[1, 8, 64]``.
    """
    import numpy as np

    with np.load(data_folder() / "clips.npz") as file:
        pixels = torch.from_numpy(file[f"frames_{clip}"][:frames])
        text = torch.from_numpy(file[f"text_{clip}"])
    video = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    if size != CLIP_PIXELS:
        video = torch.nn.functional.interpolate(video, size=(size, size), mode="area")
    return video.transpose(0, 1).contiguous(), text[None]


def load_model(device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """The trained tiny Wan in eval mode, without gradients."""
    from diffusers import WanTransformer3DModel
    from diffusers.utils import logging

    logging.disable_progress_bar()  # the demo has one of its own
    model = WanTransformer3DModel.from_pretrained(data_folder() / "tiny-wan", torch_dtype=dtype)
    return model.to(device).eval().requires_grad_(False)
