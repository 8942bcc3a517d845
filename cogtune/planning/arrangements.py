"""The choice of an arrangement for the memory engine: what each takes of a GPU and of time, and the fastest that fits.

Constants are fitted to recorded measurements, as those of :mod:`cogtune.planning.estimate` are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cogtune.config.arrangement import Arrangement, AttentionKernel, Keep

GB = 10**9
GIB = 2**30

_HEAD_BYTES = 128.0
"""Of a token in one attention head of 64 dimensions in 16 bits, beside which the kernel keeps 4 bytes of sums."""

_KEPT: dict[Keep, float] = {"inputs": 1.0, "attention": 2.0 + 4 / _HEAD_BYTES, "matmuls": 15.0, "everything": 14.34}
"""Tensors of tokens x width that a compiled block keeps."""
_KEPT_EAGER = 35.0
"""Those that an eager block keeps of everything."""
_KEPT_TRAINED = 8.0
"""Those that a block keeps besides of everything if its own weights are trained: by one measurement, of 2b."""
_WORK, _WORK_EAGER = 23.3, 35.0
"""Those that are alive while a block is recomputed and differentiated, besides what it kept."""
_WORK_WHOLE = 14.6
"""Those of a compiled block that kept everything."""
_FETCHED = 2
"""Blocks whose offloaded activations are on the GPU at once."""

_LINEAR_PASSES: dict[Keep, float] = {"inputs": 3.0, "attention": 3.0, "matmuls": 2.0, "everything": 2.0}
"""Passes through linear layers with frozen weights: forward, recomputed, backward."""
_ATTENTION_PASSES: dict[Keep, float] = {"inputs": 4.5, "attention": 3.5, "matmuls": 3.5, "everything": 3.5}
"""Forward passes that attention's arithmetic amounts to; its backward pass is two and a half."""
_TRAFFIC: dict[Keep, float] = {"inputs": 500.0, "attention": 385.0, "matmuls": 390.0, "everything": 400.0}
"""Bytes that a compiled block moves for each number of its input, besides products and attention."""
_TRAFFIC_EAGER = 2200.0

_FLOAT8_SPEED = 1.5
"""Of products in fp8 and the conversion of inputs, in that of bf16: a prototype's 5b step went from 2.085 to 1.87 s."""
_FLOAT8_WORK = 6.9
"""Tensors of tokens x width that they take besides: the prototype's reserved memory rose by 0.7 GiB."""

_FORWARD = 0.3
"""The forward pass's share of a step."""
_OFFLOAD_TAX = 0.012 / (9 * GIB)
"""Seconds that each byte of activations moved to the host and back costs where copies run beside the computation."""
_STREAM_TAX = 0.004 / (20.8 * GIB)
"""The same of each byte of weights, copied twice a step."""
_RESTORING = 2**22 * 20
"""Temporary memory in which stored weights are restored, four million at a time."""

_REGIONS = 1.12
"""What the host's regions take for each byte of activations in them."""

KERNEL_SPEED: dict[AttentionKernel | None, float] = {
    None: 1.0,
    "cudnn": 1.0,
    "flash": 0.8,
    "efficient": 0.5,
    "flash-attn-4": 1.285,
}
"""Each kernel's speed in that of cuDNN."""

MARGIN = 0.065
"""Share of a budget that a chosen arrangement's estimate leaves free."""

WORTH = 0.005
"""Share of a step's time that is given up for an arrangement that takes less of the GPU."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a GPU does: products and attention in FLOP/s, its memory and its link to the host in bytes/s."""

    products: float
    attention: float
    memory: float
    link: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What of a training step does not depend on the arrangement. Sizes in bytes, of one GPU."""

    blocks: int
    block_weights: int
    """Frozen weights of one block."""
    block_stored: int
    """The same on the host, where they may be in fewer bits."""
    other_weights: int
    """Frozen weights outside of the blocks."""
    trained: int
    """The adapter with its optimizer's state."""
    gradients: int
    tensor: int
    """One activation of tokens x width."""
    numbers: int
    """Numbers in it, times the blocks."""
    linear_flops: float
    """One forward pass through the linear layers."""
    attention_flops: float
    """One forward pass through attention."""
    passes: int
    """Forward passes of an optimizer step."""
    extra: int
    """What else is on the GPU: encoder of images, type conversions."""
    context: int
    """What CUDA and NCCL take besides PyTorch."""
    compiled: bool
    float8: bool = False
    """Whether products with frozen weights are in fp8."""
    host_state: int = 0
    """Of trained weights that are streamed: on the host, with gradients and the optimizer's state."""
    updating: int = 0
    """What the optimizer's step takes for a moment of a forward pass."""
    lent: int = 0
    """Of that, the gradients of one block, whose place its activations take in between."""
    update_up: int = 0
    """Of those, what comes to the GPU for an optimizer step."""
    update_down: int = 0
    gradients_down: int = 0
    """What leaves it in a backward pass."""

    @property
    def trains_blocks(self) -> bool:
        """Whether the streamed weights are trained."""
        return self.host_state > 0


@dataclass(frozen=True)
class CardMemory:
    """Bytes on the GPU at the peak of a step."""

    weights: int
    activations: int
    """Beyond the room that the gradients take later."""
    workspace: int


def kept_bytes(work: Workload, keep: Keep) -> float:
    """Return what one block keeps for its backward pass."""
    tensors = _KEPT_EAGER if keep == "everything" and not work.compiled else _KEPT[keep]
    if keep == "everything" and work.trains_blocks:
        tensors += _KEPT_TRAINED
    return work.tensor * tensors


def card_memory(work: Workload, arrangement: Arrangement) -> CardMemory:
    """Return what an arrangement takes of the GPU, besides the adapter and CUDA."""
    streamed = min(arrangement.streamed_blocks, work.blocks)
    slots = min(arrangement.slots, streamed)
    weights = work.other_weights + work.block_weights * (work.blocks - streamed + slots)
    if work.block_stored < work.block_weights:
        weights += work.block_stored * slots + (_RESTORING if slots else 0)
    kept, whole = kept_bytes(work, arrangement.keep), arrangement.kept_whole
    offloaded = min(arrangement.offloaded_blocks, work.blocks - whole)
    here = (work.blocks - offloaded - whole) * kept
    working = work.tensor * ((_WORK if work.compiled else _WORK_EAGER) + (_FLOAT8_WORK if work.float8 else 0.0))
    # The peak is at one of these moments of the backward pass; the gradients come as it goes on.
    peaks = [kept + working + work.gradients]
    if offloaded:
        peaks.append(min(_FETCHED, offloaded) * kept + working + work.gradients)
    if here:
        peaks.append(here + working + work.gradients * whole / work.blocks)
    if whole:
        first = work.tensor * (_WORK_WHOLE if work.compiled else _WORK_EAGER)
        present = work.gradients if work.trains_blocks else 0
        peaks.append(here + whole * kept_bytes(work, "everything") + first + present)
    if work.updating:
        peaks.append(here + work.tensor * _WORK_WHOLE + work.updating)
    activations = max(peaks) - working - work.gradients
    return CardMemory(int(weights), int(max(activations, 0)), int(working + work.extra))


def card_bytes(work: Workload, arrangement: Arrangement) -> int:
    """Return the whole GPU's memory in use at the peak of a step."""
    memory = card_memory(work, arrangement)
    return memory.weights + memory.activations + memory.workspace + work.trained + work.gradients + work.context


def host_bytes(work: Workload, arrangement: Arrangement, processes: int = 1) -> int:
    """Return the host memory that weights and activations of a machine's processes take; they share frozen weights."""
    weights = processes * work.host_state or arrangement.streamed_blocks * work.block_stored
    saved = _offloaded(work, arrangement)
    borrowed = min(saved, arrangement.offloaded_blocks * work.lent)
    return int(weights + processes * _REGIONS * (saved - borrowed))


def _offloaded(work: Workload, arrangement: Arrangement) -> float:
    """Return bytes of activations that go to the host."""
    blocks = min(arrangement.offloaded_blocks, work.blocks - arrangement.kept_whole)
    return blocks * kept_bytes(work, arrangement.keep)


def seconds(work: Workload, arrangement: Arrangement, speed: Speed) -> float:
    """Return the time of one optimizer step."""
    whole = arrangement.kept_whole / work.blocks
    products = speed.products * (_FLOAT8_SPEED if work.float8 else 1.0)
    computing = 0.0
    for keep, share in ((arrangement.keep, 1 - whole), ("everything", whole)):
        rate = speed.attention * KERNEL_SPEED[arrangement.attention]
        traffic = _TRAFFIC[keep] if work.compiled else _TRAFFIC_EAGER
        computing += share * (
            work.linear_flops * (_LINEAR_PASSES[keep] + work.trains_blocks) / products
            + work.attention_flops * _ATTENTION_PASSES[keep] / rate
            + work.numbers * traffic / speed.memory
        )
    weights = float(arrangement.streamed_blocks * work.block_stored)
    saved = _offloaded(work, arrangement)
    forward, backward = computing * _FORWARD, computing * (1 - _FORWARD)
    in_forward = max(0.0, max(weights, saved) / speed.link - forward)
    in_backward = max(0.0, max(weights + saved, work.gradients_down) / speed.link - backward)
    updating = 0.0
    if work.trains_blocks:  # in the first forward pass of a step
        updating = max(0.0, max(work.update_up, work.update_down + saved) / speed.link - forward) - in_forward
    exposed = work.passes * (in_forward + in_backward) + max(0.0, updating)
    return exposed + work.passes * (computing + saved * _OFFLOAD_TAX + 2 * weights * _STREAM_TAX)


@dataclass(frozen=True, kw_only=True)
class RequestedArrangement:
    """What of an arrangement is given; None is for the planner to choose."""

    streamed_blocks: int | None = None
    keep: Keep | None = None
    kept_whole: int | None = None
    offloaded_blocks: int | None = None
    attention: AttentionKernel | None = None


def _keeps(work: Workload) -> tuple[Keep, ...]:
    """Return what a block may be planned to keep; eager blocks cannot part with attention's outputs."""
    return ("attention", "inputs") if work.compiled else ("inputs",)


def unplanned(work: Workload, wanted: RequestedArrangement) -> Arrangement:
    """Return the arrangement of what is given alone: all else stays on the GPU."""
    return Arrangement(
        streamed_blocks=wanted.streamed_blocks or 0,
        keep=wanted.keep or _keeps(work)[0],
        kept_whole=wanted.kept_whole or 0,
        offloaded_blocks=wanted.offloaded_blocks or 0,
        attention=wanted.attention,
    )


@dataclass(frozen=True)
class HostRoom:
    """Host memory that weights and activations may take, in bytes, and the processes of the machine that share it."""

    limit: int
    processes: int


@functools.lru_cache(maxsize=64)
def arrange(
    work: Workload, budget: int, speed: Speed, wanted: RequestedArrangement, host: HostRoom | None = None
) -> tuple[Arrangement, bool]:
    """Return the fastest arrangement whose estimate fits ``budget`` bytes of the GPU, and whether there is one that
    does.

    Of those that are as fast but for :data:`WORTH`, it is the one that takes the least of the GPU; without one that
    fits, the one that takes the least of all. If ``host`` is too little for any, it is the one that takes the least of
    the host.
    """
    room = budget * (1 - MARGIN)
    tried = [(card_bytes(work, one), seconds(work, one, speed), one) for one in _candidates(work, room, wanted)]
    fitting = [row for row in tried if row[0] <= room]
    if not fitting:
        return min(tried, key=lambda row: row[0])[2], False
    if host is not None:
        taken = [host_bytes(work, row[2], host.processes) for row in fitting]
        most = max(host.limit, min(taken))
        fitting = [row for row, bytes_ in zip(fitting, taken, strict=True) if bytes_ <= most]
    enough = min(row[1] for row in fitting) * (1 + WORTH)
    leanest = min((row for row in fitting if row[1] <= enough), key=lambda row: (row[0], row[2].kept_whole, row[1]))
    return leanest[2], True


def _candidates(work: Workload, room: float, wanted: RequestedArrangement) -> Iterator[Arrangement]:
    """Yield arrangements with no more blocks offloaded than the room asks for, and with all of them."""
    every = range(work.blocks + 1)
    keeps = _keeps(work) if wanted.keep is None else (wanted.keep,)
    for keep in keeps:
        kept = kept_bytes(work, keep)
        for whole in every if wanted.kept_whole is None else (wanted.kept_whole,):
            for streamed in every if wanted.streamed_blocks is None else (wanted.streamed_blocks,):
                base = Arrangement(streamed_blocks=streamed, keep=keep, kept_whole=whole, attention=wanted.attention)
                if wanted.offloaded_blocks is not None:
                    yield replace(base, offloaded_blocks=wanted.offloaded_blocks)
                    continue
                over = card_bytes(work, base) - room
                most = work.blocks - whole
                needed = min(most, max(0, -int(-over // kept)) + (_FETCHED if over > 0 else 0))
                yield replace(base, offloaded_blocks=needed)
                if needed < most:
                    yield replace(base, offloaded_blocks=most)
