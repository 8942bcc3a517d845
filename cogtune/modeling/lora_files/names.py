"""The names of a LoRA's tensors in various programs, and the diffusers layer that each belongs to.

Sources, for CogVideoX: diffusers' ``save_lora_weights`` (``transformer.LAYER.lora_A.weight``, and before 0.22
``attn1.processor.to_q_lora.down.weight``); PEFT
(``base_model.model.LAYER.lora_A.weight``, in a raw state dict ``lora_A.default.weight``); kohya's sd-scripts and
musubi-tuner (``lora_unet_LAYER.lora_down.weight`` with the layer's dots as underscores, and ``.alpha``); VideoX-Fun
(the same with ``lora_unet__``), OneTrainer (with ``lora_transformer_``) and LyCORIS (with ``lycoris_``); ComfyUI
(``diffusion_model.LAYER``); DiffSynth-Studio (``blocks.N``, ``to_out``, ``ff.0``).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

from cogtune.models import layers
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.variants import VARIANTS

Part = Literal["down", "up", "alpha", "magnitude"]
"""Of a layer's adapter: A, which lowers to the rank, B, which raises from it, alpha, and DoRA's magnitudes."""

_PARTS: dict[str, Part] = {
    "lora_A": "down",
    "lora_down": "down",
    "lora.down": "down",
    "lora_linear_layer.down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora.up": "up",
    "lora_linear_layer.up": "up",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
}

_KEY = re.compile(
    rf"(?P<layer>.+?)[._](?P<part>{'|'.join(map(re.escape, _PARTS))})"
    r"(?:[._](?P<adapter>(?!weight$|bias$)[^.]+?))?(?:[._](?P<leaf>weight|bias))?"
)
_WRAPPERS = re.compile(r"(?<![^.])_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
"""What PyTorch puts into the names of a model that is compiled, sharded, or computes its activations again."""

_PROCESSOR = re.compile(r"\.processor\.(to_(?:q|k|v|out))_lora\.")
"""What diffusers called an attention layer's adapter before it used PEFT."""

_ALPHA = re.compile(r"(?P<layer>.+)[._]alpha")

_PREFIXES = (
    "base_model_model_",
    "base_model_",
    "diffusion_model_",
    "lora_unet_",
    "lora_transformer_",
    "lora_dit_",
    "lora_layers_",
    "lycoris_",
    "pipe_",
    "pipeline_",
    "dit_",
    "unet_",
    "denoiser_",
    "generator_",
    "student_",
    "network_",
    "state_dict_",
    "module_",
    "forward_module_",
    "model_",
    "transformer_",
    "_",
)
"""What stands in front of a layer's name, with dots as underscores; several of them may."""

_OTHER_NAMES = {
    "attn1_to_out": "attn1_to_out_0",
    "ff_0": "ff_net_0_proj",
    "ff_2": "ff_net_2",
    "patchify_proj": "patch_embed_proj",
    "context_embedder": "patch_embed_text_proj",
    "time_embedder_timestep_embedder_0": "time_embedding_linear_1",
    "time_embedder_timestep_embedder_2": "time_embedding_linear_2",
}
"""DiffSynth-Studio's names of layers, with dots as underscores."""

_BLOCK = re.compile(r"(?:transformer_)?blocks_([0-9]{1,4})_(.+)")
_LONGEST = 500
"""Characters of a name: each of its prefixes is taken off one by one."""
_FIRST = "transformer_blocks.0."

OTHER_METHODS = {
    r"[._]hada_": "LoHa",
    r"[._]lokr_": "LoKr",
    r"[._]oft_": "OFT",
    r"[._]boft_": "BOFT",
    r"[._]vera_": "VeRA",
    r"[._]lora_mid": "a Tucker decomposition (LoCon)",
    r"[._]ia3_": "IA3",
    r"[._]diff_b$": "changed biases",
    r"[._]diff$": "whole changed weights",
    r"[._]lora_embedding_|^bundle_emb\.": "adapted embeddings",
}
"""Patterns of tensors' names that are no LoRA, and what they are."""


@dataclass(frozen=True)
class TensorName:
    """A parsed tensor name."""

    layer: str
    """The layer's diffusers name."""
    part: Part
    adapter: str
    """PEFT's adapter name; empty if the file has none."""
    written: str
    """The part's name in the file."""


def parse_name(key: str) -> TensorName | None:
    """Parse the name of a LoRA's tensor; None if it is no part of an adapter, or of no CogVideoX layer."""
    if len(key) > _LONGEST:
        return None
    key = _PROCESSOR.sub(r".\1.lora.", _WRAPPERS.sub("", key))
    match = _KEY.fullmatch(key)
    if match is not None:
        if match["leaf"] == "bias":
            return None
        layer = layer_name(match["layer"])
        return TensorName(layer, _PARTS[match["part"]], match["adapter"] or "", match["part"]) if layer else None
    match = _ALPHA.fullmatch(key)
    if match is None:
        return None
    layer = layer_name(match["layer"])
    return TensorName(layer, "alpha", "", "alpha") if layer else None


def layer_name(written: str) -> str | None:
    """Return the diffusers name of the layer that a program calls ``written``, of any block; None for no layer.

    >>> layer_name("lora_unet__transformer_blocks_7_attn1_to_out_0")
    'transformer_blocks.7.attn1.to_out.0'
    """
    flat = written.replace(".", "_")
    while True:
        if (found := _known(flat)) is not None:
            return found
        prefix = next((prefix for prefix in _PREFIXES if flat.startswith(prefix)), None)
        if prefix is None:
            return None
        flat = flat.removeprefix(prefix)


def _known(flat: str) -> str | None:
    outside, inside = _names()
    match = _BLOCK.fullmatch(flat)
    if match is None:
        return outside.get(_OTHER_NAMES.get(flat, flat))
    name = inside.get(_OTHER_NAMES.get(match[2], match[2]))
    return name and f"transformer_blocks.{int(match[1])}.{name}"


@functools.cache
def _names() -> tuple[dict[str, str], dict[str, str]]:
    """Return the layers outside the blocks and those inside one, by their names with dots as underscores."""
    every = layers.layers(published_spec(VARIANTS["1.5-5b-i2v"]))  # the one that has all of them
    outside = [name for name in every if not name.startswith("transformer_blocks.")]
    inside = [name.removeprefix(_FIRST) for name in every if name.startswith(_FIRST)]
    return {name.replace(".", "_"): name for name in outside}, {name.replace(".", "_"): name for name in inside}


_SIGNS = {
    r"lora_unet__": "VideoX-Fun",
    r"lora_unet_": "kohya, musubi-tuner",
    r"lora_transformer_": "OneTrainer",
    r"lycoris_": "LyCORIS",
    r"diffusion_model\.": "ComfyUI",
    r"(pipe\.dit\.)?blocks\.": "DiffSynth-Studio",
    r"(\w+\.)?base_model\.": "PEFT",
    r".*\.processor\.to_": "diffusers before 0.22",
    r"transformer\.": "diffusers",
    r"transformer_blocks\.|(patch|time|ofs)_embed|norm_out\.|proj_out\.": "diffusers' layer names",
}
"""How the names of tensors begin, and which programs use them."""


def source_format_of(keys: list[str]) -> str:
    """Return the naming scheme, as the programs that use it."""
    for sign, name in _SIGNS.items():
        if any(re.match(sign, key) for key in keys):
            return name
    return "an unknown program"
