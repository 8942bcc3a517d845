"""The transformer's layers that an adapter can sit on, and their sizes, without the model itself.

Source: diffusers' ``CogVideoXTransformer3DModel`` and ``CogVideoXBlock``.
"""

from __future__ import annotations

from collections.abc import Iterable

from cogtune.models.checkpoint_configs import ModelSpec

_BLOCK = "transformer_blocks."


def layers(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of each layer with a weight matrix, by name; a convolution's inputs are those of a
    patch."""
    width = spec.num_attention_heads * spec.attention_head_dim
    patch = spec.patch_size**2 * (spec.patch_size_t or 1)
    time, ofs = spec.time_embed_dim, spec.ofs_embed_dim
    square = (width, width)
    block = {
        "norm1.linear": (time, 6 * width),
        "attn1.to_q": square,
        "attn1.to_k": square,
        "attn1.to_v": square,
        "attn1.to_out.0": square,
        "norm2.linear": (time, 6 * width),
        "ff.net.0.proj": (width, 4 * width),
        "ff.net.2": (4 * width, width),
    }
    return {
        "patch_embed.proj": (spec.in_channels * patch, width),
        "patch_embed.text_proj": (spec.text_embed_dim, width),
        "time_embedding.linear_1": (width, time),
        "time_embedding.linear_2": (time, time),
        **({"ofs_embedding.linear_1": (ofs, ofs), "ofs_embedding.linear_2": (ofs, ofs)} if ofs else {}),
        **{f"{_BLOCK}{n}.{name}": sizes for n in range(spec.num_layers) for name, sizes in block.items()},
        "norm_out.linear": (time, 2 * width),
        "proj_out": (width, spec.out_channels * patch),
    }


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of those weights: outputs, inputs, and of a convolution's kernel height and width."""
    shapes: dict[str, tuple[int, ...]] = {name: (outputs, inputs) for name, (inputs, outputs) in layers(spec).items()}
    if spec.patch_size_t is None:
        side = spec.patch_size
        shapes["patch_embed.proj"] = (shapes["patch_embed.proj"][0], spec.in_channels, side, side)
    return shapes


def targeted(spec: ModelSpec, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the layers whose names end in one of ``targets``, as peft reads them; a number alone would name a block
    too."""
    ends = [target for target in targets if not target.isdigit()]
    return {
        name: sizes
        for name, sizes in layers(spec).items()
        if any(name == end or name.endswith(f".{end}") for end in ends)
    }


def names(spec: ModelSpec) -> list[str]:
    """Return each kind of layer, as one usually names it."""
    first = f"{_BLOCK}0."
    return [
        name.removeprefix(first).removeprefix("attn1.")
        for name in layers(spec)
        if not name.startswith(_BLOCK) or name.startswith(first)
    ]


def product_parameters(spec: ModelSpec) -> int:
    """Return the number of weights of one block whose products are over all tokens: attention and feed-forward."""
    parts = (f"{_BLOCK}0.attn1.", f"{_BLOCK}0.ff.")
    return sum(inputs * outputs for name, (inputs, outputs) in layers(spec).items() if name.startswith(parts))


def block_parameters(spec: ModelSpec) -> int:
    """Return the number of parameters in one block."""
    width = spec.num_attention_heads * spec.attention_head_dim
    first = [sizes for name, sizes in layers(spec).items() if name.startswith(f"{_BLOCK}0.")]
    return sum(inputs * outputs + outputs for inputs, outputs in first) + 4 * width + 4 * spec.attention_head_dim


def transformer_parameters(spec: ModelSpec) -> int:
    """Return trainable numbers in the whole transformer."""
    width = spec.num_attention_heads * spec.attention_head_dim
    norms = spec.num_layers * (4 * width + 4 * spec.attention_head_dim) + 4 * width
    return norms + sum(inputs * outputs + outputs for inputs, outputs in layers(spec).values())
