"""The nano models: small CogVideoX pipelines that can draw the world of :mod:`cogtune.data.nano.world`.

Four transformers share a VAE, a text encoder and a tokenizer. On disk they are parts in one folder::

    tokenizer/  text_encoder/  vae/  transformer-2b/  transformer-5b/  transformer-5b-i2v/  transformer-1.5-5b-i2v/

from which :func:`write_nano` makes a pipeline in the diffusers format. What tells one variant from another (positions,
patches, schedules) is as in the published models; sizes are their own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from cogtune.models import random_configs
from cogtune.models.geometry import NANO_SIZE, SPATIAL_COMPRESSION
from cogtune.models.nano_models import SHARED_PARTS, transformer_part
from cogtune.models.variants import VARIANTS, BuiltIn, Variant
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained
from cogtune.system.folders import written_folder
from cogtune.system.json_files import write_json

TEXT_TOKENS = 48
"""Tokens of a caption. Fewer than the published 226, of which most would be padding: they would be 65 % of all."""

TEXT_WIDTH = 64

SCALING_FACTOR = 0.7
"""Of all four: the VAE's training ends by giving its latents a deviation of 1 / 0.7."""

_LAYERS, _HEADS, _HEAD_DIM, _TIMESTEP_WIDTH = 5, 8, 16, 32
_VAE_CHANNELS, _VAE_LAYERS, _VAE_GROUPS = (16, 32, 48, 48), 1, 8


def nano_transformer_config(row: Variant) -> dict[str, Any]:
    """Return arguments of ``CogVideoXTransformer3DModel``."""
    return random_configs.transformer_config(row, "tiny") | {
        "num_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "attention_head_dim": _HEAD_DIM,
        "time_embed_dim": _TIMESTEP_WIDTH,
        "ofs_embed_dim": _TIMESTEP_WIDTH if row.ofs_embed_dim else None,
        "text_embed_dim": TEXT_WIDTH,
        "sample_height": NANO_SIZE.height // SPATIAL_COMPRESSION,
        "sample_width": NANO_SIZE.width // SPATIAL_COMPRESSION,
        "sample_frames": NANO_SIZE.num_frames,
        "max_text_seq_length": TEXT_TOKENS,
    }


def nano_vae_config(row: Variant) -> dict[str, Any]:
    """Return arguments of ``AutoencoderKLCogVideoX``; ``invert_scale_latents`` alone differs between variants."""
    return random_configs.vae_config(row, "tiny") | {
        "block_out_channels": list(_VAE_CHANNELS),
        "layers_per_block": _VAE_LAYERS,
        "norm_num_groups": _VAE_GROUPS,
        "scaling_factor": SCALING_FACTOR,
    }


def nano_text_config(vocabulary: int) -> dict[str, Any]:
    """Return the arguments of ``T5Config`` for ``vocabulary`` tokens."""
    return random_configs.text_encoder_config(VARIANTS["5b"], "tiny") | {
        "vocab_size": vocabulary,
        "d_model": TEXT_WIDTH,
        "d_kv": 16,
        "d_ff": 128,
        "dropout_rate": 0.0,
    }


def new_vae(seed: int = 0) -> AutoencoderKLCogVideoX:
    """Return a VAE to be trained."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        return AutoencoderKLCogVideoX(**nano_vae_config(VARIANTS["5b"]))


def new_transformer(name: str, seed: int = 0) -> CogVideoXTransformer3DModel:
    """Return a transformer to be trained: torch's own weights, but for gates that are open and an output that is
    zero."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        model = CogVideoXTransformer3DModel(**nano_transformer_config(BuiltIn("nano", name).variant))
        for buffer in model.buffers():
            buffer.data = buffer.data.float()
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm2):  # shift, scale and gate of the video, then those of the text
                gates = norm.linear.bias.view(6, -1)
                gates[2] += 1.0
                gates[5] += 1.0
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    return model


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLCogVideoX, deviations: torch.Tensor) -> None:
    """Give every latent channel a deviation of ``1 / SCALING_FACTOR``, with no change of what is decoded.

    Args:
        deviations: of the channels now, ``[C]``, over encoded clips.
    """
    gain = 1.0 / (SCALING_FACTOR * deviations)
    channels = len(gain)
    out = vae.encoder.conv_out.conv
    out.weight[:channels] *= gain.view(-1, 1, 1, 1, 1)
    out.bias[:channels] *= gain
    out.bias[channels:] += 2 * gain.log()  # of the variance
    readers = [vae.decoder.conv_in] + [
        getattr(module, part)
        for module in vae.decoder.modules()
        for part in ("conv_y", "conv_b")
        if hasattr(module, part)
    ]
    for reader in readers:
        reader.conv.weight /= gain.view(1, -1, 1, 1, 1)


def write_nano(name: str, parts: Path, folder: Path) -> Path:
    """Write the pipeline ``name`` to ``folder`` from the ``parts``, completely or not at all.

    Returns:
        ``folder``, which ``DiffusionPipeline.from_pretrained`` loads. Its calls want
        ``max_sequence_length=pipeline.transformer.config.max_text_seq_length``, as for any model but the published.

    Raises:
        UsageError: there is no nano model of this name.
        CogtuneError: a part is missing, or the folder cannot be written.
    """
    row = BuiltIn("nano", name).variant
    wanted = [*SHARED_PARTS, transformer_part(row.name)]
    missing = [part for part in wanted if not (parts / part).is_dir()]
    if missing:
        raise CogtuneError(f"{parts} has no {', '.join(missing)}", "run the scripts in tools/nano to make them")
    with written_folder(folder) as aside, os_errors_explained(folder):
        for part in wanted:
            target = aside / ("transformer" if part == wanted[-1] else part)
            target.mkdir()
            for file in (parts / part).iterdir():
                if file.is_file():
                    shutil.copyfile(file, target / file.name)  # without permissions: a package may be read-only
        config = json.loads((aside / "vae" / "config.json").read_text())
        write_json(aside / "vae" / "config.json", config | {"invert_scale_latents": row.invert_scale_latents})
        scheduler = random_configs.scheduler_config(row, "tiny")
        CogVideoXDDIMScheduler(**scheduler).save_pretrained(aside / "scheduler")
        write_json(
            aside / "model_index.json",
            {
                "_class_name": "CogVideoXImageToVideoPipeline" if row.image_to_video else "CogVideoXPipeline",
                "_diffusers_version": diffusers.__version__,
                "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
                "text_encoder": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "T5Tokenizer"],
                "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
                "vae": ["diffusers", "AutoencoderKLCogVideoX"],
            },
        )
    return folder
