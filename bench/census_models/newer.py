"""Newer ones."""

from __future__ import annotations

import torch

from census_models.recipes import TEXT, rand, recipe


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
