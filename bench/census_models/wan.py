"""Wan and its family."""

from __future__ import annotations

from typing import Any

import torch

from census_models.recipes import TEXT, rand, recipe, time

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan_inputs(channels: int = 4, text: int = 16) -> dict[str, Any]:
    return {
        "hidden_states": rand(1, channels, 4, 16, 16),
        "timestep": time(),
        "encoder_hidden_states": rand(1, TEXT, text),
    }


@recipe("WanTransformer3DModel")
def _():
    return WAN, wan_inputs()


@recipe("SkyReelsV2Transformer3DModel")
def _():
    return WAN, wan_inputs()


@recipe("ChronoEditTransformer3DModel")
def _():
    config = {**WAN, "rope_temporal_skip_len": 8}
    return config, {**wan_inputs(), "hidden_states": rand(1, 4, 2, 16, 16)}


@recipe("WanVACETransformer3DModel")
def _():
    config = {**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 8}
    return config, {**wan_inputs(), "control_hidden_states": rand(1, 8, 4, 16, 16)}


@recipe("WanAnimateTransformer3DModel")
def _():
    config = {
        **WAN,
        "in_channels": 12,
        "latent_channels": 4,
        "image_dim": 16,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }
    return config, {
        "hidden_states": rand(1, 12, 5, 16, 16),
        "timestep": time(),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "encoder_hidden_states_image": rand(1, TEXT, 16),
        "pose_hidden_states": rand(1, 4, 4, 16, 16),
        "face_pixel_values": rand(1, 3, 13, 16, 16),
    }


@recipe("AnyFlowTransformer3DModel")
def _():
    config = {**WAN, "cross_attn_norm": True, "gate_value": 0.25, "deltatime_type": "r"}
    return config, {
        "hidden_states": rand(1, 4, 4, 16, 16),
        "timestep": torch.full((1, 4), 500.0),
        "r_timestep": torch.full((1, 4), 250.0),
        "encoder_hidden_states": rand(1, TEXT, 16),
    }


@recipe("HeliosTransformer3DModel")
def _():
    config = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
    config |= {
        "rope_dim": (4, 4, 4),
        "has_multi_term_memory_patch": True,
        "guidance_cross_attn": True,
        "zero_history_timestep": True,
        "is_amplify_history": False,
    }
    return config, {
        **wan_inputs(),
        "hidden_states": rand(1, 4, 2, 16, 16),
        "indices_hidden_states": torch.ones(1, 2),
        "indices_latents_history_short": torch.ones(1, 1),
        "indices_latents_history_mid": torch.ones(1, 1),
        "indices_latents_history_long": torch.ones(1, 4),
        "latents_history_short": rand(1, 4, 1, 16, 16),
        "latents_history_mid": rand(1, 4, 1, 16, 16),
        "latents_history_long": rand(1, 4, 4, 16, 16),
    }
