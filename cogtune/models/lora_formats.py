"""How programs name the tensors of a LoRA for CogVideoX, to write files that they load. Needs no torch.

Sources: those of :mod:`cogtune.modeling.lora_files.names`, and ComfyUI's ``comfy/ldm/cogvideo/model.py``, whose names
of layers its LoRA loader goes by: ``blocks.N`` for ``transformer_blocks.N``, ``time_embedding_linear_1`` for
``time_embedding.linear_1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

LoraFormatName = Literal[
    "diffusers", "peft", "kohya", "comfyui", "onetrainer", "videox-fun", "diffsynth", "finetrainers"
]

Where = Literal["header", "folder", "tensors", "nowhere"]
"""Where a format keeps alpha: in the file's header, a JSON file beside it, a tensor of each layer, or not at all."""

_PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector", "alpha": "alpha"}
_KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale", "alpha": "alpha"}
_BLOCKS = {"transformer_blocks.": "blocks."}


@dataclass(frozen=True, kw_only=True)
class LoraFormat:
    """One program's way of naming and of keeping alpha."""

    prefix: str
    parts: Mapping[str, str]
    """What follows a layer's name, for down, up, magnitude and alpha, so far as a program knows them."""
    alpha: Where
    flat: bool = False
    """Whether the dots of a layer's name are underscores."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """What parts of a layer's name are called, in place of diffusers' words."""

    def key(self, layer: str, part: str) -> str:
        """Return the name of a tensor.

        Args:
            layer: as diffusers calls it.
            part: down, up, magnitude or alpha.
        """
        for ours, theirs in self.renamed.items():
            layer = layer.replace(ours, theirs)
        return f"{self.prefix}{layer.replace('.', '_') if self.flat else layer}.{self.parts[part]}"


LORA_FORMATS: dict[LoraFormatName, LoraFormat] = {
    "diffusers": LoraFormat(prefix="transformer.", parts=_PEFT, alpha="header"),
    "peft": LoraFormat(prefix="base_model.model.", parts=_PEFT, alpha="folder"),
    "kohya": LoraFormat(prefix="lora_unet_", parts=_KOHYA, alpha="tensors", flat=True),
    "comfyui": LoraFormat(
        prefix="diffusion_model.",
        parts={**_PEFT, "magnitude": "dora_scale"},
        alpha="tensors",
        renamed={**_BLOCKS, "_embedding.linear": "_embedding_linear"},
    ),
    "onetrainer": LoraFormat(prefix="lora_transformer_", parts=_KOHYA, alpha="tensors", flat=True),
    "videox-fun": LoraFormat(prefix="lora_unet__", parts=_KOHYA, alpha="tensors", flat=True),
    "diffsynth": LoraFormat(
        prefix="",
        parts={"down": "lora_A.default.weight", "up": "lora_B.default.weight"},
        alpha="nowhere",
        renamed={
            **_BLOCKS,
            "attn1.to_out.0": "attn1.to_out",
            "ff.net.0.proj": "ff.0",
            "ff.net.2": "ff.2",
            "patch_embed.proj": "patchify.proj",
            "patch_embed.text_proj": "context_embedder",
            "time_embedding.linear_1": "time_embedder.timestep_embedder.0",
            "time_embedding.linear_2": "time_embedder.timestep_embedder.2",
        },
    ),
    "finetrainers": LoraFormat(prefix="transformer.", parts=_PEFT, alpha="header"),
}
"""Every format that is written, by the name that ``--to`` calls it by."""
