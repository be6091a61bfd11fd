"""Flux and its family."""

from __future__ import annotations

from typing import Any

import torch

from census_models.recipes import RECIPES, TEXT, rand, recipe
from census_models.wan import wan_inputs

FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}


def flux_inputs(channels: int = 4, text: int = 32) -> dict[str, Any]:
    return {
        "hidden_states": rand(1, 256, channels),
        "encoder_hidden_states": rand(1, TEXT, text),
        "img_ids": torch.rand(256, 3),
        "txt_ids": torch.rand(TEXT, 3),
        "timestep": torch.tensor([1.0]),
    }


@recipe("FluxTransformer2DModel")
def _():
    return {**FLUX, "pooled_projection_dim": 32}, {
        **flux_inputs(),
        "pooled_projections": rand(1, 32),
    }


@recipe("ChromaTransformer2DModel")
def _():
    config = {"approximator_num_channels": 8, "approximator_hidden_dim": 16}
    return {**FLUX, **config, "approximator_layers": 1}, flux_inputs()


@recipe("BriaTransformer2DModel")
def _():
    config = {"pooled_projection_dim": None, "attention_head_dim": 8, "axes_dims_rope": [0, 4, 4]}
    return {**FLUX, **config}, flux_inputs()


@recipe("BriaFiboTransformer2DModel")
def _():
    config = {
        **FLUX,
        "in_channels": 48,
        "attention_head_dim": 8,
        "joint_attention_dim": 64,
        "text_encoder_dim": 32,
        "pooled_projection_dim": None,
        "axes_dims_rope": [0, 4, 4],
    }
    inputs = flux_inputs(48, 64)
    layer = inputs["encoder_hidden_states"][:, :, :32]
    return config, {**inputs, "text_encoder_layers": [layer, layer]}


@recipe("OvisImageTransformer2DModel")
def _():
    return {**FLUX, "out_channels": 4}, flux_inputs()


@recipe("LongCatImageTransformer2DModel")
def _():
    inputs = {**flux_inputs(), "guidance": torch.tensor([3.5])}
    return {**FLUX, "pooled_projection_dim": 32}, inputs


@recipe("Flux2Transformer2DModel")
def _():
    config = {**FLUX, "timestep_guidance_channels": 256, "axes_dims_rope": (4, 4, 4, 4)}
    ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 16, 16, 1)))
    text_ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, TEXT)))
    return config, {
        **flux_inputs(),
        "img_ids": ids[None],
        "txt_ids": text_ids[None],
        "guidance": torch.tensor([1.0]),
    }


@recipe("JoyImageEditTransformer3DModel")
def _():
    config = {
        "patch_size": [1, 2, 2],
        "in_channels": 16,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "text_dim": 16,
        "num_layers": 2,
        "rope_dim_list": [4, 6, 6],
        "theta": 256,
    }
    return config, wan_inputs(16)


@recipe("JoyImageEditPlusTransformer3DModel")
def _():
    config, inputs = RECIPES["JoyImageEditTransformer3DModel"]()
    patches = {"hidden_states": rand(1, 128, 16, 1, 2, 2), "shape_list": [[(1, 8, 8), (1, 8, 8)]]}
    return config, {**inputs, **patches}


@recipe("MotifVideoTransformer3DModel")
def _():
    config = {
        "in_channels": 33,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_decoder_layers": 0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 32,
        "image_embed_dim": 4,
        "rope_axes_dim": (4, 4, 4),
    }
    return config, {**wan_inputs(text=32), "hidden_states": rand(1, 33, 3, 8, 8)}
