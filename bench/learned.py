"""q, k and v of learned attention: the tiny Wan's, on a real clip with noise, at any size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cef_compile.demo.data import load_clip, load_model
from cef_compile.demo.defaults import CLIP_PIXELS, TOKEN_PIXELS
from cef_compile.demo.latents import unshuffle
from cef_compile.demo.sampler import START, add_noise


class Inputs(TorchFunctionMode):
    """Keeps the inputs of attention over so many keys."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self._keys = keys
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call as it is."""
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            if given["key"].shape[2] == self._keys:
                self.found.append((given["query"], given["key"], given["value"]))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def inputs(
    grid: tuple[int, int, int], device: torch.device, *, clip: int = 0, level: float = START
) -> list[Tensor]:
    """q, k and v of all self attentions of one forward pass, as the heads of one.

    Args:
        grid: frames (at most 16), height and width in tokens; clips are enlarged to it.
        device: bf16 on a GPU, fp32 on a CPU.
        clip: number of the clip.
        level: noise level.

    Returns:
        three ``[1, 18, tokens, 128]`` (6 layers of 3 heads) in (B, L, H, D) memory order; tokens in
        raster order.
    """
    frames, height, width = grid
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(device, dtype)
    video, text = load_clip(clip, frames, CLIP_PIXELS)
    size = (height * TOKEN_PIXELS, width * TOKEN_PIXELS)
    enlarged = F.interpolate(video.transpose(0, 1), size, mode="bicubic").transpose(0, 1)
    noisy = add_noise(unshuffle(enlarged)[None], seed=0, level=level)
    with Inputs(frames * height * width) as seen:
        model(
            noisy.to(device, dtype),
            torch.tensor([1000 * level], device=device),
            text.to(device, dtype),
            return_dict=False,
        )
    parts = zip(*seen.found, strict=True)
    return [torch.cat([x.transpose(1, 2) for x in part], 2).transpose(1, 2) for part in parts]
