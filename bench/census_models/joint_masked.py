"""Joint attention of text and image, with a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from census_models.recipes import TEXT, rand, recipe, time
from census_models.wan import wan_inputs


def text_mask(kept: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(TEXT) < kept)[None].to(dtype)


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def hunyuan_inputs() -> dict[str, Any]:
    return {
        **wan_inputs(),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": rand(1, 8),
        "guidance": torch.tensor([6.0]),
    }


@recipe("HunyuanVideoTransformer3DModel")
def _():
    return HUNYUAN, hunyuan_inputs()


@recipe("HunyuanVideoFramepackTransformer3DModel")
def _():
    config = {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}
    return {**HUNYUAN, **config}, {
        **hunyuan_inputs(),
        "hidden_states": rand(1, 4, 3, 16, 16),
        "image_embeds": rand(1, TEXT, 16),
        "indices_latents": torch.ones(3),
        "latents_clean": rand(1, 4, 2, 16, 16),
        "indices_latents_clean": torch.ones(2),
        "latents_history_2x": rand(1, 4, 2, 16, 16),
        "indices_latents_history_2x": torch.ones(2),
        "latents_history_4x": rand(1, 4, 8, 16, 16),
        "indices_latents_history_4x": torch.ones(8),
    }


@recipe("HunyuanVideo15Transformer3DModel")
def _():
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 8,
        "image_embed_dim": 12,
        "rope_axes_dim": (2, 2, 4),
        "target_size": 16,
        "task_type": "t2v",
    }
    return config, {
        **wan_inputs(),
        "hidden_states": rand(1, 4, 1, 16, 16),
        "timestep": torch.tensor([1.0]),
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": rand(1, 4, 8),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 3, 12),
    }


@recipe("HunyuanImageTransformer2DModel")
def _():
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": (1, 1),
        "text_embed_dim": 16,
        "text_embed_2_dim": 8,
        "rope_axes_dim": (4, 4),
    }
    return config, {
        "hidden_states": rand(1, 4, 16, 16),
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "encoder_attention_mask": text_mask(),
        "encoder_hidden_states_2": rand(1, 4, 8),
        "encoder_attention_mask_2": torch.ones(1, 4),
    }


QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def qwen_inputs() -> dict[str, Any]:
    return {
        "hidden_states": rand(1, 256, 16),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "encoder_hidden_states_mask": text_mask(dtype=torch.long),
        "timestep": torch.tensor([1.0]),
        "img_shapes": [(1, 16, 16)],
    }


@recipe("QwenImageTransformer2DModel")
def _():
    return QWEN, qwen_inputs()


@recipe("NucleusMoEImageTransformer2DModel")
def _():
    return {**QWEN, "moe_enabled": False, "capacity_factors": [8.0, 8.0]}, qwen_inputs()


@recipe("Krea2Transformer2DModel")
def _():
    config = {
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 8,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 2, 2),
    }
    ids = torch.zeros(TEXT + 256, 3)
    ids[TEXT:, 1:] = torch.cartesian_prod(torch.arange(16), torch.arange(16)).float()
    return config, {
        "hidden_states": rand(1, 256, 4),
        "encoder_hidden_states": rand(1, TEXT, 3, 16),
        "timestep": torch.tensor([0.5]),
        "position_ids": ids,
        "encoder_attention_mask": text_mask(dtype=torch.bool),
    }


@recipe("ErnieImageTransformer2DModel")
def _():
    config = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 16,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 1,
        "text_in_dim": 16,
        "rope_axes_dim": (8, 4, 4),
    }
    return config, {
        "hidden_states": rand(1, 16, 16, 16),
        "timestep": torch.tensor([1.0]),
        "text_bth": rand(1, TEXT, 16),
        "text_lens": torch.tensor([TEXT]),
    }


@recipe("Ideogram4Transformer2DModel")
def _():
    from diffusers.models.transformers import transformer_ideogram4 as module

    config = {
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": 16,
        "rope_theta": 10000,
        "mrope_section": (2, 1, 1),
    }
    length = TEXT + 256
    image = torch.zeros(1, length, 1)
    image[:, TEXT:] = 1
    ids = torch.arange(length)[None, :, None].expand(1, -1, 3)
    kinds = torch.full((1, length), module.OUTPUT_IMAGE_INDICATOR)
    kinds[:, :TEXT] = module.LLM_TOKEN_INDICATOR
    return config, {
        "hidden_states": rand(1, length, 4) * image,
        "encoder_hidden_states": rand(1, length, 16) * (1 - image),
        "timestep": torch.tensor([0.5]),
        "position_ids": ids,
        "segment_ids": torch.ones(1, length, dtype=torch.long),
        "indicator": kinds,
    }


@recipe("LongCatAudioDiTTransformer")
def _():
    config = {
        "dit_dim": 64,
        "dit_depth": 2,
        "dit_heads": 4,
        "dit_text_dim": 32,
        "latent_dim": 8,
        "text_conv": False,
    }
    return config, {
        "hidden_states": rand(1, 256, 8),
        "encoder_hidden_states": rand(1, TEXT, 32),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
        "attention_mask": torch.ones(1, 256, dtype=torch.bool),
        "timestep": torch.ones(1),
    }


@recipe("ZImageTransformer2DModel")
def _():
    config = {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    }
    return config, {
        "x": [rand(16, 1, 32, 32)],
        "cap_feats": [rand(16, 16)],
        "t": torch.tensor([0.5]),
    }


@recipe("Lumina2Transformer2DModel")
def _():
    config = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 2,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (128, 128, 128),
        "cap_feat_dim": 32,
    }
    return config, {
        "hidden_states": rand(1, 4, 32, 32),
        "encoder_hidden_states": rand(1, TEXT, 32),
        "timestep": torch.tensor([0.5]),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
    }


@recipe("MochiTransformer3DModel")
def _():
    config = {
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": 16,
    }
    mask = {"encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool)}
    return config, {**wan_inputs(), **mask}


@recipe("HiDreamImageTransformer2DModel")
def _():
    config = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_channels": [8, 4],
        "text_emb_dim": 8,
        "num_routed_experts": 2,
        "num_activated_experts": 2,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (32, 32),
        "llama_layers": (0, 1),
        "force_inference_output": True,
    }
    return config, {
        "hidden_states": rand(1, 4, 32, 32),
        "encoder_hidden_states_t5": rand(1, 8, 8),
        "encoder_hidden_states_llama3": rand(2, 1, 8, 4),
        "pooled_embeds": rand(1, 8),
        "timesteps": time(),
    }
