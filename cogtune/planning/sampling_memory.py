"""How much of a GPU's memory sampling takes, and the least to give up for a budget.

Sizes of weights follow from the model's geometry. What a block and the VAE work with is counted from diffusers' code:
it was not measured, and errs on the high side.
"""

from __future__ import annotations

from dataclasses import dataclass

from cogtune.config.arrangement import SamplingArrangement
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import Size, video_tokens
from cogtune.models.layers import block_parameters, product_parameters, transformer_parameters
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


@dataclass(frozen=True)
class SamplingTask:
    """What is sampled, as far as it decides the memory that this takes."""

    spec: ModelSpec
    size: Size
    precision: Precision
    adapters: int = 0
    """Numbers in all LoRAs together."""
    float8: bool = False
    """Whether the base's matrix products are in 8-bit floating point."""


def sampling_bytes(task: SamplingTask, arrangement: SamplingArrangement) -> int:
    """Return the whole GPU's memory in use at the peak of sampling one video."""
    spec, item = task.spec, BYTES[task.precision]
    blocks, slots = spec.num_layers, min(arrangement.slots, arrangement.streamed_blocks)
    block = (block_parameters(spec) + task.adapters // blocks) * item
    if task.float8:
        block -= product_parameters(spec) * (item - 1)
    rest = (transformer_parameters(spec) - blocks * block_parameters(spec) + VAE_PARAMETERS) * item
    resident = rest + (blocks - arrangement.streamed_blocks + slots) * block
    resident += CONTEXT + (PINNING if arrangement.streamed_blocks else 0)
    tokens = video_tokens(task.size, spec.patch_size, spec.patch_size_t) + spec.max_text_seq_length
    width = spec.num_attention_heads * spec.attention_head_dim
    denoising = int(_WORK * (1 if arrangement.split_guidance else 2) * tokens * width * item)
    return resident + max(denoising, decoding_bytes(task.size, task.precision, tiles=arrangement.vae_tiles))


def decoding_bytes(size: Size, precision: Precision, *, tiles: bool) -> int:
    """Return what the VAE needs besides its weights to decode or encode a video."""
    area = size.height * size.width
    at_once = min(area, _TILE) if tiles else area
    share = at_once / _NATIVE * min(size.num_frames, _TOGETHER) / _TOGETHER * BYTES[precision] / 2
    return int(_DECODE * share) + 2 * 3 * size.num_frames * area * BYTES[precision]


def plan_sampling(task: SamplingTask, budget: int) -> tuple[SamplingArrangement, int, bool]:
    """Return the arrangement that gives up the least for ``budget`` bytes, its estimate, and whether it fits.

    Without one that fits it is the one that takes the least.
    """
    leanest: tuple[SamplingArrangement, int] | None = None
    for split in (False, True):
        for streamed in range(task.spec.num_layers + 1):
            for tiles in (False, True):
                tried = SamplingArrangement(streamed_blocks=streamed, split_guidance=split, vae_tiles=tiles)
                needed = sampling_bytes(task, tried)
                if needed <= budget * (1 - MARGIN):
                    return tried, needed, True
                if leanest is None or needed < leanest[1]:
                    leanest = (tried, needed)
    assert leanest is not None
    return (*leanest, False)


def arrangement_for(task: SamplingTask, budget: int) -> SamplingArrangement:
    """Return the arrangement for the user's budget.

    Raises:
        UsageError: nothing fits it; names the least that does.
    """
    arrangement, needed, fits = plan_sampling(task, budget)
    if not fits:
        least = needed / (1 - MARGIN) / GB
        raise UsageError(
            f"--vram {budget / GB:g}GB is too small: {task.size} takes an estimated {least:.1f} GB or more",
            f"use --vram {least + 0.05:.1f}GB, a smaller --size or fewer --frames",
        )
    return arrangement


def what_fits(task: SamplingTask, free: int, *, tried: SamplingArrangement) -> str:
    """Return what to change after sampling ran out of memory on a GPU with ``free`` bytes for it.

    Args:
        tried: the arrangement that was not enough.
    """
    now = sampling_bytes(task, tried)
    budget = min(free, now - 1)
    arrangement, needed, fits = plan_sampling(task, budget)
    if fits and arrangement != tried:
        told = arrangement.describe(task.spec.num_layers)
        return f"use --vram {budget / GB:.1f}GB, an estimated {needed / GB:.1f} GB: {told}"
    least = f"free memory on the GPU or use another: {task.size} takes an estimated {needed / GB:.1f} GB or more"
    return least if task.spec.learned_positions else f"use a smaller --size or fewer --frames, or {least}"
