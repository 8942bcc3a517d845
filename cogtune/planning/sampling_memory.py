"""How much of a GPU's memory sampling takes, and the least to give up for a budget.

Sizes of weights follow from the model's geometry. What a block and the VAE work with is counted from diffusers' code:
it was not measured, and errs on the high side.
"""

from __future__ import annotations

from cogtune.config.arrangement import SamplingArrangement
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import Size, video_tokens
from cogtune.models.layers import block_parameters, transformer_parameters
from cogtune.models.variants import Precision
from cogtune.planning.arrangements import MARGIN
from cogtune.planning.estimate import BYTES, CONTEXT, GIB, PINNING, VAE_PARAMETERS
from cogtune.system.errors import UsageError

GB = 10**9

_WORK = 16.0
"""Tensors of tokens x width that are alive in a block of the forward pass: its inputs, norms, queries, keys, values,
and the feed-forward layer's, which is four times as wide, before and behind its activation."""

_NATIVE = 480 * 720
_DECODE = 17.8 * GIB
"""What the VAE takes for 9 frames of 480x720 in 16 bits. Source: the assessment in diffusers' ``tiled_decode``."""
_TILE = 240 * 360
"""Pixels of a tile, the VAE's own default."""
_TOGETHER = 9
"""Frames that the VAE works on at a time: eight, and the first."""


def sampling_bytes(
    spec: ModelSpec, size: Size, precision: Precision, arrangement: SamplingArrangement, *, adapters: int = 0
) -> int:
    """Return the whole GPU's memory in use at the peak of sampling one video.

    Args:
        adapters: numbers in all LoRAs together.
    """
    item, width = BYTES[precision], spec.num_attention_heads * spec.attention_head_dim
    blocks, block = spec.num_layers, block_parameters(spec)
    slots = min(arrangement.slots, arrangement.streamed_blocks)
    here = (
        transformer_parameters(spec) + adapters - (arrangement.streamed_blocks - slots) * (block + adapters // blocks)
    )
    resident = (here + VAE_PARAMETERS) * item + CONTEXT + (PINNING if arrangement.streamed_blocks else 0)
    tokens = video_tokens(size, spec.patch_size, spec.patch_size_t) + spec.max_text_seq_length
    denoising = int(_WORK * (1 if arrangement.split_guidance else 2) * tokens * width * item)
    return resident + max(denoising, decoding_bytes(size, precision, tiles=arrangement.vae_tiles))


def decoding_bytes(size: Size, precision: Precision, *, tiles: bool) -> int:
    """Return what the VAE needs besides its weights to decode or encode a video."""
    area = size.height * size.width
    at_once = min(area, _TILE) if tiles else area
    share = at_once / _NATIVE * min(size.num_frames, _TOGETHER) / _TOGETHER * BYTES[precision] / 2
    return int(_DECODE * share) + 2 * 3 * size.num_frames * area * BYTES[precision]


def plan_sampling(
    spec: ModelSpec, size: Size, precision: Precision, budget: int, *, adapters: int = 0
) -> tuple[SamplingArrangement, int, bool]:
    """Return the arrangement that gives up the least for ``budget`` bytes, its estimate, and whether it fits.

    Without one that fits it is the one that takes the least.
    """
    leanest: tuple[SamplingArrangement, int] | None = None
    for split in (False, True):
        for streamed in range(spec.num_layers + 1):
            for tiles in (False, True):
                tried = SamplingArrangement(streamed_blocks=streamed, split_guidance=split, vae_tiles=tiles)
                needed = sampling_bytes(spec, size, precision, tried, adapters=adapters)
                if needed <= budget * (1 - MARGIN):
                    return tried, needed, True
                if leanest is None or needed < leanest[1]:
                    leanest = (tried, needed)
    assert leanest is not None
    return (*leanest, False)


def arrangement_for(
    spec: ModelSpec, size: Size, precision: Precision, budget: int, *, adapters: int = 0
) -> SamplingArrangement:
    """Return the arrangement for the user's budget.

    Raises:
        UsageError: nothing fits it; names the least that does.
    """
    arrangement, needed, fits = plan_sampling(spec, size, precision, budget, adapters=adapters)
    if not fits:
        least = needed / (1 - MARGIN) / GB
        raise UsageError(
            f"--vram {budget / GB:g}GB is too small: {size} takes an estimated {least:.1f} GB or more",
            f"use --vram {least + 0.05:.1f}GB, a smaller --size or fewer --frames",
        )
    return arrangement


def what_fits(
    spec: ModelSpec,
    size: Size,
    precision: Precision,
    free: int,
    *,
    tried: SamplingArrangement,
    adapters: int = 0,
) -> str:
    """Return what to change after sampling ran out of memory on a GPU with ``free`` bytes for it.

    Args:
        tried: the arrangement that was not enough.
    """
    now = sampling_bytes(spec, size, precision, tried, adapters=adapters)
    budget = min(free, now - 1)
    arrangement, needed, fits = plan_sampling(spec, size, precision, budget, adapters=adapters)
    if fits and arrangement != tried:
        told = arrangement.describe(spec.num_layers)
        return f"use --vram {budget / GB:.1f}GB, an estimated {needed / GB:.1f} GB: {told}"
    least = f"free memory on the GPU or use another: {size} takes an estimated {needed / GB:.1f} GB or more"
    return least if spec.learned_positions else f"use a smaller --size or fewer --frames, or {least}"
