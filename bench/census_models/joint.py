"""Joint attention of text and image, without a mask."""

from __future__ import annotations

from typing import Any

import torch

from census_models.recipes import TEXT, rand, recipe, time
from census_models.wan import wan_inputs

COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 13,
    "max_text_seq_length": 8,
}


def cog_inputs() -> dict[str, Any]:
    return {
        "hidden_states": rand(1, 4, 4, 16, 16),
        "encoder_hidden_states": rand(1, 8, 8),
        "timestep": time(),
    }


@recipe("CogVideoXTransformer3DModel")
def _():
    return COG, cog_inputs()


@recipe("ConsisIDTransformer3DModel")
def _():
    config = {
        "cross_attn_interval": 1,
        "is_train_face": True,
        "cross_attn_dim_head": 8,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 2,
        "LFE_vit_dim": 2,
        "LFE_depth": 5,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 1,
        "LFE_num_querie": 1,
        "LFE_output_dim": 21,
        "LFE_ff_mult": 1,
        "LFE_num_scale": 1,
    }
    face = {"id_vit_hidden": [torch.ones(1, 2, 2)], "id_cond": torch.ones(1, 2)}
    return {**COG, **config}, {**cog_inputs(), **face}


def view_sizes() -> dict[str, Any]:
    return {
        "original_size": torch.tensor([[128, 128]]),
        "target_size": torch.tensor([[128, 128]]),
        "crop_coords": torch.tensor([[0, 0]]),
    }


COGVIEW = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "out_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 2,
}


def cogview_inputs() -> dict[str, Any]:
    return {
        "hidden_states": rand(1, 4, 32, 32),
        "encoder_hidden_states": rand(1, 8, 8),
        "timestep": time(),
        **view_sizes(),
    }


@recipe("CogView3PlusTransformer2DModel")
def _():
    return {**COGVIEW, "pos_embed_max_size": 16, "sample_size": 32}, cogview_inputs()


@recipe("CogView4Transformer2DModel")
def _():
    return COGVIEW, cogview_inputs()


@recipe("GlmImageTransformer2DModel")
def _():
    inputs = cogview_inputs()
    del inputs["original_size"]
    return {**COGVIEW, "prior_vq_quantizer_codebook_size": 64}, {
        **inputs,
        "target_size": torch.tensor([[32.0, 32.0]]),
        "crop_coords": torch.zeros(1, 2),
        "prior_token_id": torch.randint(0, 64, (1, 256)),
        "prior_token_drop": torch.zeros(1, dtype=torch.bool),
    }


@recipe("EasyAnimateTransformer3DModel")
def _():
    config = {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "in_channels": 4,
        "mmdit_layers": 2,
        "num_layers": 2,
        "out_channels": 4,
        "patch_size": 2,
        "sample_height": 60,
        "sample_width": 90,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "time_position_encoding_type": "3d_rope",
    }
    return config, wan_inputs()


@recipe("HunyuanDiT2DModel")
def _():
    config = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "cross_attention_dim": 8,
        "cross_attention_dim_t5": 8,
        "pooled_projection_dim": 4,
        "hidden_size": 16,
        "text_len": 4,
        "text_len_t5": 4,
    }
    return config, {
        "hidden_states": rand(1, 4, 32, 32),
        "encoder_hidden_states": rand(1, 4, 8),
        "text_embedding_mask": torch.ones(1, 4),
        "encoder_hidden_states_t5": rand(1, 4, 8),
        "text_embedding_mask_t5": torch.ones(1, 4),
        "timestep": torch.tensor([3.0]),
        "image_meta_size": torch.tensor([[1024.0, 1024.0, 16.0, 16.0, 0.0, 0.0]]),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": [torch.ones(256, 8), torch.zeros(256, 8)],
    }


@recipe("SD3Transformer2DModel")
def _():
    config = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 64,
        "out_channels": 4,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return config, {
        "hidden_states": rand(1, 4, 32, 32),
        "encoder_hidden_states": rand(1, TEXT, 32),
        "pooled_projections": rand(1, 64),
        "timestep": time(),
    }


@recipe("AuraFlowTransformer2DModel")
def _():
    config = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "out_channels": 4,
        "pos_embed_max_size": 256,
    }
    return config, {
        "hidden_states": rand(1, 4, 32, 32),
        "encoder_hidden_states": rand(1, TEXT, 32),
        "timestep": time(),
    }


@recipe("PRXTransformer2DModel")
def _():
    config = {
        "in_channels": 4,
        "patch_size": 2,
        "context_in_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [8, 8],
    }
    return config, {
        "hidden_states": rand(1, 4, 32, 32),
        "encoder_hidden_states": rand(1, TEXT, 32),
        "timestep": torch.tensor([1.0]),
    }


@recipe("Cosmos3OmniTransformer")
def _():
    config = {
        "head_dim": 6,
        "hidden_act": "relu2",
        "hidden_size": 12,
        "intermediate_size": 24,
        "latent_channel": 2,
        "latent_patch_size": 1,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "patch_latent_dim": 2,
        "qk_norm_for_text": False,
        "rope_axes_dim": [1, 1, 1],
        "vocab_size": 32,
    }
    vision = torch.arange(2, 258)
    return config, {
        "input_ids": torch.tensor([1, 2]),
        "text_indexes": torch.tensor([0, 1]),
        "position_ids": torch.zeros(3, 258, dtype=torch.long),
        "und_len": 2,
        "sequence_length": 258,
        "vision_tokens": [rand(1, 2, 1, 16, 16)],
        "vision_token_shapes": [(1, 16, 16)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.ones(256),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


@recipe("OmniGenTransformer2DModel")
def _():
    config = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_layers": 2,
        "pad_token_id": 0,
        "vocab_size": 1000,
        "in_channels": 4,
        "time_step_dim": 4,
        "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
    }
    length = 80 + 1 + 64
    return config, {
        "hidden_states": rand(1, 4, 16, 16),
        "timestep": torch.rand(1),
        "input_ids": torch.randint(0, 10, (1, 80)),
        "input_img_latents": [rand(1, 4, 16, 16)],
        "input_image_sizes": {0: [[0, 64]]},
        "attention_mask": torch.ones(1, length, length),
        "position_ids": torch.arange(length)[None],
    }
