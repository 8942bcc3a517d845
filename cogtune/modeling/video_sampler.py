"""A model loaded for sampling in the memory available, for any number of videos."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor

from cogtune.config.arrangement import SamplingArrangement
from cogtune.modeling.devices import DTYPES, best_device
from cogtune.modeling.encoders import OFFLOADED_TEXT_BATCH, TextEncoder
from cogtune.modeling.engine import attach
from cogtune.modeling.engine.engine import blocks_of
from cogtune.modeling.engine.float8 import use_float8
from cogtune.modeling.lora_files import Lora, add_all, scale_all
from cogtune.modeling.pipelines import Frames, UnbatchedGuidance, pipeline_class, render, scheduler_for, unit_image
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.configs import TransformerConfig
from cogtune.models.geometry import Size
from cogtune.models.locate import loading
from cogtune.models.variants import FrozenPrecision, Precision, SamplingScheduler
from cogtune.system.json_files import read_json
from cogtune.system.reading import read_as


@dataclass(frozen=True, kw_only=True)
class VideoSamplerSetup:
    """What is loaded, and how."""

    base: Path
    transformer: Path | None = None
    """A folder of fine-tuned weights in place of the base's own."""
    loras: tuple[tuple[Lora, float], ...] = ()
    """Each with its weight."""
    spec: ModelSpec
    precision: Precision
    base_precision: FrozenPrecision | None = None
    text_encoder_precision: FrozenPrecision | None = None
    scheduler: SamplingScheduler
    arrangement: SamplingArrangement = field(default_factory=SamplingArrangement)
    room: int | None = None
    """Bytes of the GPU that PyTorch may take; all that is free when None."""

    @property
    def model(self) -> Hashable:
        """What distinguishes the model from others, whatever its LoRAs and the memory for it."""
        formats = self.precision, self.base_precision, self.text_encoder_precision
        return self.base, self.transformer, formats, self.scheduler


@dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """One video to sample."""

    prompt: str
    negative_prompt: str = ""
    seed: int
    size: Size
    steps: int
    guidance: float
    lora_scale: float = 1.0
    """What the strengths of all LoRAs are multiplied by."""
    loras: tuple[int, ...] | None = None
    """The numbers of the LoRAs in use, of those that are loaded; None for all."""
    image: Tensor | None = None
    """First frame ``[3, H, W]`` uint8, for an image-to-video model."""
    clip: Tensor | None = None
    """Frames ``[F, 3, H, W]`` uint8 that the video is made of."""
    strength: float = 1.0


class VideoSampler:
    """A model that samples one video after another.

    The text encoder is in memory first and alone, for all prompts; then the transformer and the VAE.
    """

    def __init__(
        self, setup: VideoSamplerSetup, texts: Sequence[str], tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """Encode ``texts`` and load the rest.

        Args:
            texts: every prompt and negative prompt that will be asked for; without any, no text encoder is loaded.
            tell: called with remarks for the user.

        Raises:
            CogtuneError: a file is damaged, or a LoRA was not taken over as it is.
        """
        self.setup, self._tell = setup, tell
        self.device = best_device()
        self._dtype = DTYPES[setup.precision]
        if setup.room is not None and self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, setup.room / total), torch.cuda.current_device())
        self._texts = self._encoded(texts) if texts else {}
        self._transformer = self._loaded_transformer()
        self._pipeline = self._made_pipeline()

    def sample(self, inputs: SampleInputs, on_step: Callable[[int], None] | None = None) -> Frames:
        """Sample one video: frames ``[F, H, W, 3]`` uint8.

        Args:
            on_step: called after each denoising step with its number, from 1.

        Raises:
            NotFinite: the model or the VAE overflowed.
        """
        self.transformer_with(inputs.loras, inputs.lora_scale)
        given: dict[str, Any] = {
            "prompt_embeds": self._texts[inputs.prompt],
            "negative_prompt_embeds": self._texts[inputs.negative_prompt],
        }
        if inputs.image is not None:
            given["image"] = unit_image(inputs.image)
        return render(
            self._pipeline,
            self.setup.spec,
            inputs.size,
            steps=inputs.steps,
            guidance=inputs.guidance,
            seed=inputs.seed,
            clip=inputs.clip,
            strength=inputs.strength,
            on_step=on_step,
            **given,
        )

    def transformer_with(self, loras: Sequence[int] | None, scale: float = 1.0) -> CogVideoXTransformer3DModel:
        """Return the transformer with these of its LoRAs in use, and all others off.

        Args:
            loras: the numbers of the LoRAs; None for all, none for the base.
            scale: what their strengths are multiplied by.
        """
        weights = [weight for _, weight in self.setup.loras]
        if weights:
            used = range(len(weights)) if loras is None else loras
            scale_all(self._transformer, {_name(number): weights[number] * scale for number in used})
        return self._transformer

    def _encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode texts to ``[1, L, D]`` on the device; one by one if the encoder fits, as the pipelines do."""
        setup = self.setup
        encoder = TextEncoder(
            setup.base,
            max_tokens=setup.spec.max_text_seq_length,
            device=self.device,
            dtype=self._dtype,
            float8=setup.text_encoder_precision == "fp8",
            room=setup.room,
            tell=self._tell,
        )
        unique = list(dict.fromkeys(texts))
        group = OFFLOADED_TEXT_BATCH if encoder.in_layers else 1
        embeddings: list[Tensor] = []
        for start in range(0, len(unique), group):
            embeddings += encoder.encode(unique[start : start + group])
        del encoder
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        rows = (embedding.unsqueeze(0).to(self.device, self._dtype) for embedding in embeddings)
        return dict(zip(unique, rows, strict=True))

    def _loaded_transformer(self) -> CogVideoXTransformer3DModel:
        setup = self.setup
        folder = setup.transformer or setup.base / "transformer"
        read_as(folder / "config.json", TransformerConfig)
        with loading(folder):
            transformer = CogVideoXTransformer3DModel.from_pretrained(folder, dtype=self._dtype)
        if setup.loras:
            add_all(transformer, {_name(number): pair for number, pair in enumerate(setup.loras)})
        transformer.requires_grad_(False).eval()
        if setup.base_precision == "fp8":
            use_float8(blocks_of(transformer), dtype=self._dtype, device=self.device, differentiable=False)
        if setup.arrangement.streamed_blocks:
            arrangement = setup.arrangement.of_transformer
            attach(transformer, arrangement, device=self.device, tell=self._tell)
        return transformer.to(self.device)

    def _made_pipeline(self) -> Any:
        setup = self.setup
        with loading(setup.base / "vae"):
            vae = AutoencoderKLCogVideoX.from_pretrained(setup.base / "vae", dtype=self._dtype)
        vae.to(self.device).eval()
        if setup.arrangement.vae_tiles:
            vae.enable_tiling()
        config = read_json(setup.base / "scheduler" / "scheduler_config.json")
        pipeline = pipeline_class(setup.spec)(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            transformer=UnbatchedGuidance(self._transformer) if setup.arrangement.split_guidance else self._transformer,
            scheduler=scheduler_for(setup.spec, config, setup.scheduler),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _name(number: int) -> str:
    """Return the name of a LoRA's adapter."""
    return f"lora-{number}"
