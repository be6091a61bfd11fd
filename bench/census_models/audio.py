"""Audio and others."""

from __future__ import annotations

import torch

from census_models.recipes import TEXT, rand, recipe


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
