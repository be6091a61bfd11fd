"""Self and cross attention apart."""

from __future__ import annotations

import torch

from census_models.joint_masked import text_mask
from census_models.recipes import RECIPES, TEXT, rand, recipe, time
from census_models.wan import wan_inputs


@recipe("LTXVideoTransformer3DModel")
def _():
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": 16,
    }
    return config, {
        "hidden_states": rand(1, 256, 4),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "timestep": time(),
        "encoder_attention_mask": text_mask(dtype=torch.bool),
        "num_frames": 4,
        "height": 8,
        "width": 8,
    }


@recipe("LTX2VideoTransformer3DModel")
def _():
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8,
        "num_layers": 2,
        "caption_channels": 16,
        "rope_double_precision": False,
    }
    return config, {
        "hidden_states": rand(1, 256, 4),
        "audio_hidden_states": rand(1, 9, 4),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "audio_encoder_hidden_states": rand(1, TEXT, 16),
        "timestep": torch.tensor([3.0]),
        "encoder_attention_mask": text_mask(dtype=torch.bool),
        "num_frames": 4,
        "height": 8,
        "width": 8,
        "audio_num_frames": 9,
        "fps": 25.0,
    }


@recipe("CosmosTransformer3DModel")
def _():
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "concat_padding_mask": False,  # resizing it takes torchvision
        "extra_pos_embed_type": "learnable",
    }
    return config, {
        **wan_inputs(),
        "hidden_states": rand(1, 4, 2, 16, 16),
        "attention_mask": text_mask(),
        "fps": 30,
    }


@recipe("AllegroTransformer3DModel")
def _():
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_width": 16,
        "sample_height": 16,
        "sample_frames": 4,
        "caption_channels": 16,
    }
    return config, wan_inputs()


DIT = {
    "sample_size": 32,
    "num_layers": 2,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 8,
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


@recipe("DiTTransformer2DModel")
def _():
    return {**DIT, "num_embeds_ada_norm": 8, "norm_type": "ada_norm_zero"}, {
        "hidden_states": rand(1, 4, 32, 32),
        "timestep": time(),
        "class_labels": torch.tensor([1]),
    }


@recipe("PixArtTransformer2DModel")
def _():
    config = {"cross_attention_dim": 16, "use_additional_conditions": False}
    return {**DIT, **config, "norm_type": "ada_norm_single", "caption_channels": None}, {
        "hidden_states": rand(1, 4, 32, 32),
        "timestep": time(),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "encoder_attention_mask": text_mask(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@recipe("Transformer2DModel")
def _():
    config = {"norm_type": "ada_norm_single", "num_embeds_ada_norm": 8, "caption_channels": 16}
    return {**DIT, **config, "cross_attention_dim": 16, "use_additional_conditions": False}, {
        "hidden_states": rand(1, 4, 32, 32),
        "timestep": time(),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@recipe("LatteTransformer3DModel")
def _():
    config = {**DIT, "num_layers": 1, "caption_channels": 8, "cross_attention_dim": 16}
    config["video_length"] = 2
    return {**config, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000}, {
        "hidden_states": rand(1, 4, 2, 32, 32),
        "encoder_hidden_states": rand(1, TEXT, 8),
        "timestep": time(),
        "enable_temporal_attentions": True,
    }


@recipe("SanaTransformer2DModel")
def _():
    config = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 4,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 4,
        "cross_attention_dim": 8,
        "caption_channels": 8,
        "sample_size": 16,
    }
    return config, {
        "hidden_states": rand(1, 4, 16, 16),
        "encoder_hidden_states": rand(1, TEXT, 8),
        "timestep": time(),
    }


@recipe("SanaVideoTransformer3DModel")
def _():
    config = {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "sample_size": 8,
        "patch_size": (1, 2, 2),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return config, wan_inputs(16)


@recipe("LuminaNextDiT2DModel")
def _():
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    config = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "learn_sigma": False,
        "cross_attention_dim": 32,
    }
    return config, {
        "hidden_states": rand(1, 4, 32, 32),
        "encoder_hidden_states": rand(1, TEXT, 32),
        "timestep": torch.tensor([0.5]),
        "encoder_mask": text_mask(dtype=torch.bool),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 384, 384),
        "cross_attention_kwargs": {},
    }


@recipe("Kandinsky5Transformer3DModel")
def _():
    config = {
        "in_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 8,
        "time_dim": 16,
        "out_visual_dim": 4,
        "patch_size": (1, 2, 2),
        "model_dim": 24,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 4, 4),
    }
    return config, {
        "hidden_states": rand(1, 4, 16, 16, 4),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "timestep": torch.tensor([3.0]),
        "pooled_projections": rand(1, 8),
        "visual_rope_pos": [torch.arange(4), torch.arange(8), torch.arange(8)],
        "text_rope_pos": torch.arange(TEXT),
    }


@recipe("Flux3Transformer2DModel")
def _():
    config = {
        "in_channels": 4,
        "cond_in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    _, inputs = RECIPES["Flux2Transformer2DModel"]()
    del inputs["guidance"]
    return config, {**inputs, "img_ids": inputs["img_ids"][0], "txt_ids": inputs["txt_ids"][0]}


@recipe("AnyFlowFARTransformer3DModel")
def _():
    config, inputs = RECIPES["AnyFlowTransformer3DModel"]()
    chunks = {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3}
    return {**config, **chunks}, {**inputs, "chunk_partition": [2, 2]}
