"""Tiny configurations of diffusers' transformers, with inputs that fit, for the census.

Each has random weights and enough tokens for several key tiles where its class allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Recipe = Callable[[], tuple[dict[str, Any], dict[str, Any]]]
"""Returns the arguments of a class and those of its forward."""
RECIPES: dict[str, Recipe] = {}

OUT_OF_REACH: dict[str, str] = {
    "WanAnimate2Transformer3DModel": "its forward needs a cache that its pipeline fills",
}
"""Classes that have no recipe, and why."""

TEXT = 12
"""Text tokens."""


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model by the name of its class, in eval mode, and its inputs.

    Raises:
        KeyError: the class has no recipe.
        AttributeError: the installed diffusers has no such class.
    """
    import diffusers

    recipe = RECIPES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config, inputs = recipe()
        model = getattr(diffusers, name)(**config).eval()
        # Some classes start with zeros where training will put the output's gate.
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.detach().any():
                nn.init.normal_(parameter, std=0.02)
    return model, inputs


def recipe(name: str) -> Callable[[Recipe], Recipe]:
    def add(function: Recipe) -> Recipe:
        RECIPES[name] = function
        return function

    return add


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape)


def time(*shape: int) -> Tensor:
    return torch.full(shape or (1,), 3)


# --- Wan and its family --------------------------------------------------------------------------

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


# --- Flux and its family -------------------------------------------------------------------------

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


# --- joint attention with a mask -----------------------------------------------------------------


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


# --- joint attention without a mask --------------------------------------------------------------

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


# --- self and cross attention --------------------------------------------------------------------


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


# --- audio and others ----------------------------------------------------------------------------


@recipe("AceStepTransformer1DModel")
def _():
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "in_channels": 24,
        "audio_acoustic_hidden_dim": 8,
        "patch_size": 2,
        "sliding_window": 16,
    }
    return config, {
        "hidden_states": rand(1, 256, 8),
        "timestep": torch.rand(1),
        "timestep_r": torch.rand(1),
        "encoder_hidden_states": rand(1, TEXT, 32),
        "context_latents": rand(1, 256, 16),
    }


@recipe("MiniMaxMusic3Transformer1DModel")
def _():
    config = {
        "in_channels": 8,
        "condition_dim": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "ff_inner_dim": 32,
        "rotary_dim": 4,
        "fourier_embedding_dim": 8,
    }
    return config, {
        "hidden_states": rand(1, 8, 256),
        "encoder_hidden_states": rand(1, 256, 16),
        "timestep": torch.tensor([0.5]),
    }


@recipe("StableAudioDiTModel")
def _():
    config = {
        "sample_size": 256,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 1,
        "cross_attention_dim": 8,
        "cross_attention_input_dim": 8,
        "time_proj_dim": 16,
        "global_states_input_dim": 16,
    }
    return config, {
        "hidden_states": rand(1, 4, 256),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": rand(1, TEXT, 8),
        "global_hidden_states": rand(1, 1, 16),
        "rotary_embedding": (torch.ones(257, 4), torch.zeros(257, 4)),
    }


@recipe("PriorTransformer")
def _():
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "embedding_dim": 16,
        "num_embeddings": 77,
        "additional_embeddings": 4,
    }
    return config, {
        "hidden_states": rand(1, 16),
        "timestep": 2,
        "proj_embedding": rand(1, 16),
        "encoder_hidden_states": rand(1, 77, 16),
    }


@recipe("TransformerTemporalModel")
def _():
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4}
    return {**config, "num_layers": 1, "norm_num_groups": 1}, {
        "hidden_states": rand(2, 4, 16, 16),
        "num_frames": 2,
    }


# --- Newer ones ----------------------------------------------------------------------------------


@recipe("StableAudio3DiTModel")
def _():
    config = {
        "io_channels": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "cond_token_dim": 8,
        "global_cond_dim": 8,
        "local_add_cond_dim": 5,
        "timestep_features_dim": 16,
        "num_memory_tokens": 4,
    }
    return config, {
        "hidden_states": rand(1, 4, 256),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": rand(1, TEXT, 8),
        "global_hidden_states": rand(1, 8),
    }


@recipe("MiniMaxMusic3RVQDepthDecoder")
def _():
    config = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "audio_vocab_size": 16,
        "num_codebooks": 4,
    }
    return config, {"inputs_embeds": rand(1, 4, 16)}


@recipe("T5FilmDecoder")
def _():
    config = {
        "input_dims": 8,
        "targets_length": 1024,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 8,
        "d_ff": 32,
    }
    return config, {
        "encodings_and_masks": [(rand(1, TEXT, 16), torch.ones(1, TEXT))],
        "decoder_input_tokens": rand(1, 1024, 8),
        "decoder_noise_time": torch.tensor([0.5]),
    }


@recipe("QwenImage21Transformer2DModel")
def _():
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    return config, {
        "hidden_states": rand(1, 256, 4),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 16, 16)]],
        "img_mask": torch.arange(TEXT + 64)[None] >= TEXT,
    }


@recipe("Kandinsky6Transformer3DModel")
def _():
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 8,
        "time_dim": 16,
        "model_dim": 24,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 4, 4),
        "visual_cond": False,
        "in_audio_dim": 4,
        "out_audio_dim": 4,
    }
    return config, {
        "hidden_states": rand(1, 4, 16, 16, 4),
        "encoder_hidden_states": rand(1, TEXT, 16),
        "pooled_projections": rand(1, 8),
        "timestep": torch.tensor([3.0]),
        "audio_hidden_states": rand(1, 32, 4),
    }


@recipe("Kandinsky6SRTransformer3DModel")
def _():
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "time_dim": 16,
        "model_dim": 24,
        "ff_dim": 32,
        "num_visual_blocks": 2,
        "axes_dims": (4, 4, 4),
    }
    return config, {"hidden_states": rand(1, 4, 16, 16, 9), "timestep": torch.tensor([3.0])}


@recipe("BriaFibo2Transformer2DModel")
def _():
    config = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 16,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 4,
        "gist_min_text_len": 4,
        "gist_max_text_len": 16,
        "axes_dims": (4, 6, 6),
        "axes_lens": (32, 32, 32),
    }
    return config, {
        "hidden_states": rand(1, 4, 32, 32),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": rand(1, 2, TEXT, 16),
    }


@recipe("DreamLiteTransformer2DModel")
def _():
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 16,
        "num_layers": 2,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    }
    return config, {
        "hidden_states": rand(1, 16, 16, 16),
        "encoder_hidden_states": rand(1, TEXT, 16),
    }
