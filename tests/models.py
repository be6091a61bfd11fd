"""Tiny models with random weights, as the compiler tests need them, and inputs that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]


def _seeded(make: Callable[[], Built]) -> Callable[..., Built]:
    def build(seed: int = 0) -> Built:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, inputs = make()
        return model.eval(), {**inputs, "return_dict": False}

    return build


@_seeded
def wan() -> Built:
    """Wan: 1,024 video tokens, self attention and cross attention to 8 text tokens."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 4, 32, 32),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
    }


@_seeded
def flux() -> Built:
    """Flux: joint attention of 16 text and 1,024 image tokens, double and single blocks."""
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": torch.randn(1, 1024, 4),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "pooled_projections": torch.randn(1, 32),
        "img_ids": torch.rand(1024, 3),
        "txt_ids": torch.rand(16, 3),
        "timestep": torch.tensor([1.0]),
    }


@_seeded
def cogvideox() -> Built:
    """CogVideoX: joint attention of 8 text and 1,024 video tokens; q and k contiguous, v not."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=32,
        sample_height=32,
        sample_frames=13,
        max_text_seq_length=8,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 4, 32, 32),
        "encoder_hidden_states": torch.randn(1, 8, 8),
        "timestep": torch.tensor([3]),
    }


@_seeded
def sd3() -> Built:
    """SD3.5: joint attention, and self attention of the image in its dual layers."""
    model = SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=64,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 64, 64),
        "encoder_hidden_states": torch.randn(1, 20, 32),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([3]),
    }


@_seeded
def ltx() -> Built:
    """LTX-Video: self attention, and cross attention under a float mask."""
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=16,
    )
    return model, {
        "hidden_states": torch.randn(1, 4 * 16 * 16, 8),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "timestep": torch.tensor([3]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]),
        "num_frames": 4,
        "height": 16,
        "width": 16,
    }


@_seeded
def hunyuan_video() -> Built:
    """HunyuanVideo: joint attention under a mask of text padding, and a text refiner."""
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    mask = torch.ones(1, 12)
    mask[:, 7:] = 0
    return model, {
        "hidden_states": torch.randn(1, 4, 4, 16, 16),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([6.0]),
    }


class Attention(nn.Module):
    """Self attention as a user may write it; ``options`` go to SDPA as they are."""

    def __init__(self, width: int = 32, heads: int = 2, **options: Any) -> None:
        super().__init__()
        self.heads, self.options = heads, options
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens ``[B, L, width]`` in and out."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, **self.options
        )
        return out.transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """A model of several equal blocks, for regional compilation."""

    def __init__(self, depth: int = 3, width: int = 32, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(width, **options) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, L, width]`` in and out."""
        for block in self.blocks:
            x = x + block(x)
        return x


def tokens(length: int = 640, width: int = 32, batch: int = 1, seed: int = 0) -> Tensor:
    """Tokens with neighbours alike, so that some tiles matter more than others."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(batch, length, width, generator=generator)
    return 2 * steps.cumsum(1) / torch.arange(1, length + 1).sqrt()[:, None]
