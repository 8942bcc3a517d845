"""The configs of the published models, and of tiny ones built like them."""

from __future__ import annotations

from typing import Any, Literal

from cogtune.models.variants import Variant

Scale = Literal["tiny", "full"]


LATENT_CHANNELS = 16


_TIMESTEP_WIDTH: dict[Scale, int] = {"tiny": 32, "full": 512}


_TEXT_WIDTH: dict[Scale, int] = {"tiny": 32, "full": 4096}


# A patch of 1.5 is 128 numbers in and out: in a width near that, an adapter on frozen weights has no room to work.
_TINY_LAYERS, _TINY_HEADS, _TINY_HEAD_DIM = 2, 16, 16


_TINY_LATENT_HEIGHT, _TINY_LATENT_WIDTH = 8, 12


def transformer_config(variant: Variant, scale: Scale) -> dict[str, Any]:
    """Return arguments of ``CogVideoXTransformer3DModel``; for ``full`` those of the published checkpoint."""
    tiny = scale == "tiny"
    return {
        "num_layers": _TINY_LAYERS if tiny else variant.num_layers,
        "num_attention_heads": _TINY_HEADS if tiny else variant.num_heads,
        "attention_head_dim": _TINY_HEAD_DIM if tiny else variant.head_dim,
        "in_channels": 2 * LATENT_CHANNELS if variant.image_to_video else LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embed_dim": _TIMESTEP_WIDTH[scale],
        # The two embeddings are added, so they are equally wide.
        "ofs_embed_dim": _TIMESTEP_WIDTH[scale] if variant.ofs_embed_dim else None,
        "text_embed_dim": _TEXT_WIDTH[scale],
        "dropout": 0.0,
        "attention_bias": True,
        "sample_height": _TINY_LATENT_HEIGHT if tiny else variant.sample_height,
        "sample_width": _TINY_LATENT_WIDTH if tiny else variant.sample_width,
        "sample_frames": variant.frame_multiple + 1 if tiny else variant.sample_frames,
        "patch_size": 2,
        "patch_size_t": variant.patch_size_t,
        "patch_bias": variant.patch_size_t is None,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 226,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": variant.rotary,
        "use_learned_positional_embeddings": variant.learned_positions,
    }


def vae_config(variant: Variant, scale: Scale) -> dict[str, Any]:
    """Return arguments of ``AutoencoderKLCogVideoX``: 8x8 in space and 4 in time at either scale."""
    tiny = scale == "tiny"
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["CogVideoXDownBlock3D"] * 4,
        "up_block_types": ["CogVideoXUpBlock3D"] * 4,
        "block_out_channels": [8, 8, 8, 8] if tiny else [128, 256, 256, 512],
        "latent_channels": LATENT_CHANNELS,
        "layers_per_block": 1 if tiny else 3,
        "act_fn": "silu",
        "norm_eps": 1e-6,
        "norm_num_groups": 4 if tiny else 32,
        "temporal_compression_ratio": 4,
        "sample_height": 480,  # decides the size of tiles: smaller ones would not fit together
        "sample_width": 720,
        "scaling_factor": variant.vae_scaling_factor,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "invert_scale_latents": variant.invert_scale_latents,
    }


def text_encoder_config(variant: Variant, scale: Scale) -> dict[str, Any]:  # noqa: ARG001 - one signature for all four
    """Return arguments of ``T5Config``: the encoder of T5 v1.1, of size XXL for ``full``; the same for all five
    models."""
    tiny = scale == "tiny"
    return {
        "vocab_size": 512 if tiny else 32128,
        "d_model": _TEXT_WIDTH[scale],
        "d_kv": 8 if tiny else 64,
        "d_ff": 64 if tiny else 10240,
        "num_layers": 2 if tiny else 24,
        "num_decoder_layers": 2 if tiny else 24,
        "num_heads": 4 if tiny else 64,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "use_cache": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


def scheduler_config(variant: Variant, scale: Scale) -> dict[str, Any]:  # noqa: ARG001 - one signature for all four
    """Return arguments of ``CogVideoXDDIMScheduler``, the class that the published checkpoints name; alike at both
    scales."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": "v_prediction",
        "sample_max_value": 1.0,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": variant.snr_shift_scale,
    }
