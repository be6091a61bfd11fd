"""Pipelines of diffusers with tiny, random components: what the examples' ``--dry-run`` builds.

Nothing is downloaded. The pictures mean nothing; the way through the pipeline is the real one.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

PROMPT = "a fox runs through fresh snow at dawn"
WIDTH = 32
"""Of all text embeddings."""

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": WIDTH,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words of the prompt; all others are one token."""
    words = {"<pad>": 1, "</s>": 2, "<unk>": 3}
    words |= {word: 4 + i for i, word in enumerate(sorted(set(PROMPT.split())))}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    model.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, model_max_length=77, **names
    )


def t5() -> transformers.T5EncoderModel:
    """A text encoder of embeddings."""
    config = transformers.T5Config(
        d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4, vocab_size=64
    )
    return transformers.T5EncoderModel(config).eval()


def clip(width: int = WIDTH, projected: bool = False) -> transformers.PreTrainedModel:
    """A text encoder of one pooled embedding."""
    config = transformers.CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=64,
        projection_dim=WIDTH,
    )
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return getattr(transformers, kind)(config).eval()


def wan(experts: int = 1, five_b: bool = False) -> diffusers.WanPipeline:
    """Wan 2.1, or 2.2 with two experts, or 2.2 5B with its own VAE."""
    vae: dict[str, Any] = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1]}
    config = dict(WAN)
    if five_b:
        vae |= {"z_dim": 48, "in_channels": 12, "out_channels": 12, "is_residual": True}
        vae |= {"patch_size": 2, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
        vae |= {"scale_factor_spatial": 16}
        config |= {"in_channels": 48, "out_channels": 48}
    models = [diffusers.WanTransformer3DModel(**config).eval() for _ in range(experts)]
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        transformer=models[0],
        transformer_2=models[1] if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        expand_timesteps=five_b,
        vae=diffusers.AutoencoderKLWan(
            num_res_blocks=1, temperal_downsample=[False, True, True], **vae
        ).eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def image_vae(channels: int) -> diffusers.AutoencoderKL:
    """A VAE of pictures that keeps their size."""
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()


def flux() -> diffusers.FluxPipeline:
    """Flux."""
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        vae=image_vae(1),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        ).eval(),
    )


def sd35() -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3.5, with a dual layer."""
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(projected=True),
        text_encoder_2=clip(projected=True),
        text_encoder_3=t5(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(),
        vae=image_vae(4),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            out_channels=4,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ).eval(),
    )


def qwen_image() -> diffusers.QwenImagePipeline:
    """Qwen-Image."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "rope_scaling": {"mrope_section": [1, 1, 2], "type": "default"},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer(),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=24,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ).eval(),
    )


def hunyuan_video() -> diffusers.HunyuanVideoPipeline:
    """HunyuanVideo."""
    llama = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=1,
        vocab_size=64,
    )
    return diffusers.HunyuanVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=transformers.LlamaModel(llama).eval(),
        text_encoder_2=clip(8),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ).eval(),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ).eval(),
    )


def cogvideox() -> diffusers.CogVideoXPipeline:
    """CogVideoX."""
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ).eval(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=WIDTH,
            num_layers=2,
            sample_width=16,
            sample_height=16,
            sample_frames=9,
            max_text_seq_length=16,
        ).eval(),
    )


def ltx_video() -> diffusers.LTXPipeline:
    """LTX-Video."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    ).eval()
    return diffusers.LTXPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=WIDTH,
        ).eval(),
    )


BUILD = {
    "wan21": wan,
    "wan22_14b": lambda: wan(experts=2),
    "wan22_5b": lambda: wan(five_b=True),
    "hunyuan_video": hunyuan_video,
    "ltx_video": ltx_video,
    "cogvideox": cogvideox,
    "flux": flux,
    "sd35": sd35,
    "qwen_image": qwen_image,
}
SIZES: dict[str, dict[str, Any]] = {
    "wan21": {"height": 256, "width": 256, "num_frames": 9},
    "wan22_14b": {"height": 256, "width": 256, "num_frames": 9},
    "wan22_5b": {"height": 512, "width": 512, "num_frames": 9},
    "hunyuan_video": {"height": 192, "width": 192, "num_frames": 5},
    "ltx_video": {"height": 64, "width": 64, "num_frames": 9},
    "cogvideox": {"height": 256, "width": 256, "num_frames": 9},
    "flux": {"height": 64, "width": 64},
    "sd35": {"height": 32, "width": 32},
    "qwen_image": {"height": 256, "width": 256},
}
"""At which each has more tokens than a CPU needs to filter."""


def build(name: str, seed: int = 0) -> diffusers.DiffusionPipeline:
    """A pipeline by the name of its example."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = BUILD[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe
