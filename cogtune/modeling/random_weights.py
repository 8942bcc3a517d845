"""Complete CogVideoX pipelines with random weights: for a laptop (``tiny``) or of the real dimensions (``full``).

No download: the same files as a published checkpoint, made here, so that every path of the program can be tried,
tested and measured. What differs between the five models comes from their rows in :mod:`cogtune.models.variants`. The
rest follows the published configs and, for schedulers, diffusers' ``scripts/convert_cogvideox_to_diffusers.py``.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import diffusers
import sentencepiece
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from cogtune.modeling.devices import DTYPES
from cogtune.models.random_configs import (
    LATENT_CHANNELS,
    Scale,
    scheduler_config,
    text_encoder_config,
    transformer_config,
    vae_config,
)
from cogtune.models.tiny_models import (
    CHARACTERS,
    EMBEDDING_GAIN,
    GATE_BIAS,
    LATENT_GAIN,
    LOGVAR_BIAS,
    OUTPUT_GAIN,
    WORDS,
)
from cogtune.models.variants import Variant
from cogtune.system.files import os_errors_explained
from cogtune.system.folders import written_folder
from cogtune.system.json_files import write_json

_EXTRA_IDS = 100


@contextlib.contextmanager
def _seeded_init(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Create parameters on ``device`` in ``dtype`` from ``seed`` inside the context; restore torch's state after."""
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        gpus = []
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            gpus = [torch.cuda.current_device()]
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.enter_context(torch.no_grad())
        stack.enter_context(device)
        # torch.manual_seed would reseed every device, also those that are not forked.
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def build_transformer(
    variant: Variant, scale: Scale, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> CogVideoXTransformer3DModel:
    """Return a transformer with random weights, made in ``dtype`` straight on ``device`` (``meta`` for its shapes
    alone)."""
    with _seeded_init(torch.device(device), dtype, seed):
        model = CogVideoXTransformer3DModel(**transformer_config(variant, scale))
        if scale == "tiny":
            _widen_transformer_init(model)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(dtype)  # diffusers makes positions, a buffer, in fp64
    return model.eval()


def build_vae(
    variant: Variant, scale: Scale, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> AutoencoderKLCogVideoX:
    """Return a VAE with random weights, made in ``dtype`` straight on ``device``."""
    with _seeded_init(torch.device(device), dtype, seed):
        model = AutoencoderKLCogVideoX(**vae_config(variant, scale))
        if scale == "tiny":
            _widen_vae_init(model)
    return model.eval()


def build_text_encoder(
    variant: Variant, scale: Scale, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> T5EncoderModel:
    """Return a T5 encoder with random weights, made in ``dtype`` straight on ``device``."""
    with _seeded_init(torch.device(device), dtype, seed):
        model = T5EncoderModel(T5Config(**text_encoder_config(variant, scale)))
    return model.eval()


def _widen_transformer_init(model: CogVideoXTransformer3DModel) -> None:
    """Let a LoRA on the attention of a frozen random model change what comes out.

    With torch's own initial weights the gates are about 0.1, so that what attention adds hardly shows beside what the
    embedding put there, and the last layer norm holds the output to a deviation of 0.6, where the target's is 1.
    """
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            # CogVideoXLayerNormZero: shift, scale and gate of the video, then those of the text
            parts = norm.linear.bias.view(6, -1)
            parts[2] += GATE_BIAS
            parts[5] += GATE_BIAS
    model.patch_embed.proj.weight *= EMBEDDING_GAIN
    model.proj_out.weight *= OUTPUT_GAIN


def _widen_vae_init(model: AutoencoderKLCogVideoX) -> None:
    """Give latents the spread that a trained VAE gives them.

    With torch's own initial weights the latents' deviation is 0.34 and that of the noise on them 1. Here scaled latents
    have a deviation of about 1, with noise of 0.05 on them; frames decoded from such latents, of about 0.5.
    """
    mean_gain = LATENT_GAIN / model.config.scaling_factor
    convolution = model.encoder.conv_out.conv
    convolution.weight[:LATENT_CHANNELS] *= mean_gain
    convolution.bias[:LATENT_CHANNELS] *= mean_gain
    convolution.bias[LATENT_CHANNELS:] += LOGVAR_BIAS


@lru_cache(maxsize=1)
def _tokenizer_model() -> bytes:
    """Return a SentencePiece unigram model of our own words, whose special pieces stand where T5 has them."""
    made = io.BytesIO()
    ring = WORDS + WORDS[:6]
    phrases = (" ".join(ring[start : start + 7]) + "." for start in range(len(WORDS)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*phrases, CHARACTERS]),
        model_writer=made,
        model_type="unigram",
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        num_threads=1,  # more of them sum in another order, and the bytes differ
        minloglevel=2,
    )
    return made.getvalue()


def write_tokenizer(folder: Path, model: bytes, *, max_tokens: int = 226) -> None:
    """Write the files of a published T5 tokenizer: ``spiece.model`` and the names of the special tokens.

    Args:
        model: a SentencePiece model whose first pieces are ``<pad>``, ``</s>`` and ``<unk>``.
    """
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    extra = [f"<extra_id_{number}>" for number in range(_EXTRA_IDS)]
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    added = {token: pieces + _EXTRA_IDS - 1 - number for number, token in enumerate(extra)}
    ids = {"<pad>": 0, "</s>": 1, "<unk>": 2} | added
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(folder / "added_tokens.json", added)
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": extra, **special})
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(index): {"content": token, **flags} for token, index in ids.items()},
            "additional_special_tokens": extra,
            "clean_up_tokenization_spaces": True,
            "extra_ids": _EXTRA_IDS,
            "legacy": True,
            "model_max_length": max_tokens,
            "tokenizer_class": "T5Tokenizer",
            **special,
        },
    )


def write_pipeline(
    variant: Variant,
    folder: Path,
    *,
    scale: Scale = "tiny",
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a complete pipeline with random weights to ``folder`` atomically, replacing what is there.

    Its parts are made one after the other, so that the largest alone has to fit on ``device``. The same seed gives the
    same bytes on the same kind of device.

    Args:
        dtype: of the weights; by default fp32 for ``tiny``, else what the variant was trained in.

    Returns:
        ``folder``, which ``DiffusionPipeline.from_pretrained`` loads.

    Raises:
        CogtuneError: the folder cannot be written.
    """
    if dtype is None:
        dtype = DTYPES["fp32" if scale == "tiny" else variant.trained_in]
    # Saving a text encoder imports DeepSpeed, which logs to stdout; that is for results
    with contextlib.redirect_stdout(sys.stderr), written_folder(folder) as aside, os_errors_explained(folder):
        write_tokenizer(aside / "tokenizer", _tokenizer_model())
        CogVideoXDDIMScheduler(**scheduler_config(variant, scale)).save_pretrained(aside / "scheduler")
        # The largest files that the published checkpoints have
        shards = {"text_encoder": "5GB", "transformer": "10GB", "vae": "10GB"}
        builders = {"text_encoder": build_text_encoder, "transformer": build_transformer, "vae": build_vae}
        for part, build in builders.items():
            build(variant, scale, device=device, dtype=dtype, seed=seed).save_pretrained(
                aside / part, max_shard_size=shards[part]
            )
        pipeline = "CogVideoXImageToVideoPipeline" if variant.image_to_video else "CogVideoXPipeline"
        write_json(
            aside / "model_index.json",
            {
                "_class_name": pipeline,
                "_diffusers_version": diffusers.__version__,
                "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
                "text_encoder": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "T5Tokenizer"],
                "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
                "vae": ["diffusers", "AutoencoderKLCogVideoX"],
            },
        )
    return folder


def write_for_training(
    variant: Variant, folder: Path, *, scale: Scale, seed: int = 0, device: torch.device | str = "cpu"
) -> Path:
    """Write to ``folder`` atomically what a training process reads of a pipeline: no text encoder,
    and a VAE's weights only for an image-to-video model.

    Raises:
        CogtuneError: the folder cannot be written.
    """
    dtype = DTYPES["fp32" if scale == "tiny" else variant.trained_in]
    with written_folder(folder) as aside, os_errors_explained(folder):
        CogVideoXDDIMScheduler(**scheduler_config(variant, scale)).save_pretrained(aside / "scheduler")
        transformer = build_transformer(variant, scale, device=device, dtype=dtype, seed=seed)
        transformer.save_pretrained(aside / "transformer", max_shard_size="10GB")
        del transformer
        if variant.image_to_video:
            build_vae(variant, scale, device=device, dtype=dtype, seed=seed).save_pretrained(aside / "vae")
        else:
            (aside / "vae").mkdir()
            write_json(aside / "vae" / "config.json", vae_config(variant, scale))
        pipeline = "CogVideoXImageToVideoPipeline" if variant.image_to_video else "CogVideoXPipeline"
        write_json(aside / "model_index.json", {"_class_name": pipeline, "_diffusers_version": diffusers.__version__})
    return folder


def write_for_encoding(
    variant: Variant, folder: Path, *, scale: Scale, seed: int = 0, device: torch.device | str = "cpu"
) -> Path:
    """Write to ``folder`` atomically what filling a cache reads of a pipeline: no transformer weights.

    Raises:
        CogtuneError: the folder cannot be written.
    """
    dtype = DTYPES["fp32" if scale == "tiny" else variant.trained_in]
    with written_folder(folder) as aside, os_errors_explained(folder):
        write_tokenizer(aside / "tokenizer", _tokenizer_model())
        CogVideoXDDIMScheduler(**scheduler_config(variant, scale)).save_pretrained(aside / "scheduler")
        build_text_encoder(variant, scale, device=device, dtype=dtype, seed=seed).save_pretrained(
            aside / "text_encoder", max_shard_size="5GB"
        )
        build_vae(variant, scale, device=device, dtype=dtype, seed=seed).save_pretrained(aside / "vae")
        (aside / "transformer").mkdir()
        write_json(aside / "transformer" / "config.json", transformer_config(variant, scale))
        pipeline = "CogVideoXImageToVideoPipeline" if variant.image_to_video else "CogVideoXPipeline"
        write_json(aside / "model_index.json", {"_class_name": pipeline, "_diffusers_version": diffusers.__version__})
    return folder
