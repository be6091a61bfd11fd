"""Example calls of diffusers' well-known transformers, on the meta device: shapes, no numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is generated.

    Attributes:
        height, width: in pixels.
        frames: of a video; 1 for a picture.
        text: text tokens.
    """

    height: int
    width: int
    frames: int
    text: int

    def latent(self, config: Any, space: int, time: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a VAE that compresses so much."""
        return (self.frames - 1) // time + 1, self.height // space, self.width // space


@dataclass(frozen=True)
class Model:
    """A class that can be explained without its weights.

    Attributes:
        size: what is generated unless the user says otherwise.
        inputs: makes the arguments of a call from (config, size).
    """

    size: Size
    inputs: Callable[[Any, Size], Inputs]


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that is never filled."""
    return torch.zeros(*shape, dtype=dtype, device="meta")


def wan(config: Any, size: Size) -> Inputs:
    """Wan 2.1 and 2.2; the 5B model of 2.2 has a VAE of its own, told by its 48 channels."""
    space = 16 if config.out_channels == 48 else 8
    inputs = {
        "hidden_states": zeros(1, config.in_channels, *size.latent(config, space, 4)),
        "timestep": zeros(1),
        "encoder_hidden_states": zeros(1, size.text, config.text_dim),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = zeros(1, 257, config.image_dim)
    return inputs


def flux(config: Any, size: Size) -> Inputs:
    """Flux.1: 2 x 2 latents of an 8 x 8 VAE in a token."""
    _, height, width = size.latent(config, 16, 1)
    inputs = {
        "hidden_states": zeros(1, height * width, config.in_channels),
        "encoder_hidden_states": zeros(1, size.text, config.joint_attention_dim),
        "pooled_projections": zeros(1, config.pooled_projection_dim),
        "img_ids": zeros(height * width, 3),
        "txt_ids": zeros(size.text, 3),
        "timestep": zeros(1),
    }
    return {**inputs, "guidance": zeros(1)} if config.guidance_embeds else inputs


def hunyuan_video(config: Any, size: Size) -> Inputs:
    """HunyuanVideo."""
    inputs = {
        "hidden_states": zeros(1, config.in_channels, *size.latent(config, 8, 4)),
        "timestep": zeros(1),
        "encoder_hidden_states": zeros(1, size.text, config.text_embed_dim),
        "encoder_attention_mask": zeros(1, size.text),
        "pooled_projections": zeros(1, config.pooled_projection_dim),
    }
    return {**inputs, "guidance": zeros(1)} if config.guidance_embeds else inputs


def cogvideox(config: Any, size: Size) -> Inputs:
    """CogVideoX; the 1.5 models patch time too, and pad the latent frames to whole patches."""
    frames, height, width = size.latent(config, 8, 4)
    if config.patch_size_t is not None:
        frames += -frames % config.patch_size_t
    inputs = {
        "hidden_states": zeros(1, frames, config.in_channels, height, width),
        "encoder_hidden_states": zeros(1, size.text, config.text_embed_dim),
        "timestep": zeros(1),
    }
    return inputs if config.ofs_embed_dim is None else {**inputs, "ofs": zeros(1)}


def ltx_video(config: Any, size: Size) -> Inputs:
    """LTX-Video: a latent of a 32 x 32 x 8 VAE is a token."""
    frames, height, width = size.latent(config, 32, 8)
    return {
        "hidden_states": zeros(1, frames * height * width, config.in_channels),
        "encoder_hidden_states": zeros(1, size.text, config.caption_channels),
        "timestep": zeros(1),
        "encoder_attention_mask": zeros(1, size.text),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def sd3(config: Any, size: Size) -> Inputs:
    """Stable Diffusion 3 and 3.5."""
    _, height, width = size.latent(config, 8, 1)
    return {
        "hidden_states": zeros(1, config.in_channels, height, width),
        "encoder_hidden_states": zeros(1, size.text, config.joint_attention_dim),
        "pooled_projections": zeros(1, config.pooled_projection_dim),
        "timestep": zeros(1),
    }


def qwen_image(config: Any, size: Size) -> Inputs:
    """Qwen-Image: 2 x 2 latents of an 8 x 8 VAE in a token."""
    _, height, width = size.latent(config, 16, 1)
    return {
        "hidden_states": zeros(1, height * width, config.in_channels),
        "encoder_hidden_states": zeros(1, size.text, config.joint_attention_dim),
        "encoder_hidden_states_mask": None,
        "timestep": zeros(1),
        "img_shapes": [[(1, height, width)]],
    }


MODELS: Final = {
    "CogVideoXTransformer3DModel": Model(Size(480, 720, 49, 226), cogvideox),
    "FluxTransformer2DModel": Model(Size(1024, 1024, 1, 512), flux),
    "HunyuanVideoTransformer3DModel": Model(Size(720, 1280, 129, 256), hunyuan_video),
    "LTXVideoTransformer3DModel": Model(Size(512, 768, 161, 128), ltx_video),
    "QwenImageTransformer2DModel": Model(Size(1328, 1328, 1, 512), qwen_image),
    "SD3Transformer2DModel": Model(Size(1024, 1024, 1, 333), sd3),
    "WanTransformer3DModel": Model(Size(720, 1280, 81, 512), wan),
}
"""By class name, each at a size that it is usually run at."""
