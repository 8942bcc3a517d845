"""What a run will take, before it starts: memory of each GPU and of the host, disk, and time.

Sizes follow from the model's geometry and the run's configuration. The few numbers that do not (how many activations
are alive at once, what libraries keep) are constants, fitted to the recorded measurements; ``python -m
tools.measurements`` shows how far off each estimate is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from cogtune.config.arrangement import Arrangement, AttentionKernel
from cogtune.config.launchers import REDUCE_BUCKET, largest_group
from cogtune.config.optimizers import OPTIMIZERS
from cogtune.config.run_config import RunConfig
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import SPATIAL_COMPRESSION, latent_frames
from cogtune.models.layers import block_parameters, layers, targeted, transformer_parameters
from cogtune.planning import arrangements
from cogtune.planning.arrangements import HostRoom, RequestedArrangement, Workload
from cogtune.planning.speeds import SPEEDS, flops_of_step, seconds_of_step, speed_of, tokens_of
from cogtune.planning.streaming import Numbers, checkpoint_bytes, trained_weights
from cogtune.run.plan import size_of
from cogtune.system.errors import UsageError

GIB = 2**30

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
STORED_BYTES = {"int8": 1 + 4 / 256, "nf4": 1 / 2 + 4 / 64}
"""Of a number with its share of a scale; all but 0.1 % of a block's are stored so."""
VAE_PARAMETERS = 215_583_907

"""What an optimizer keeps on the GPU for each trained number."""

# Activations alive while a block is computed again and differentiated, in tensors of tokens x width.
_WORK_EAGER = 35.0
_WORK_COMPILED = 25.2
_WORK_ZERO3 = 31.0
_WORK_FP16 = 10.0
"""More of them under fp16."""
_ENGINE_WORK_FP16 = 6.0
"""The same on the memory engine."""
_KEPT_A_BLOCK = 15.0
"""Tensors that a block keeps for the backward pass without gradient checkpointing."""
CONTEXT = int(0.75 * GIB)
"""CUDA's context and the libraries' own memory on a GPU."""
PINNING = int(0.11 * GIB)
"""What CUDA takes more where much of the host's memory is pinned."""
_NCCL_ALONE = int(0.93 * GIB)
"""What NCCL adds to that under DeepSpeed, which starts it for a single process too."""
_NCCL = int(1.32 * GIB)
"""What it adds where several processes work together."""

_LIVE_PARAMETERS = 720_000_000
"""Elements, of the billion that DeepSpeed's ZeRO-3 may keep gathered by default."""

# What PyTorch's allocator has reserved and cannot hand out, since communication runs in streams of its own.
_IDLE_ZERO2 = 0.5
"""Under ZeRO-2, this share of the gradients and of the buckets they come in."""
_IDLE_ZERO3 = 18
"""Under ZeRO-3, the weights of so many blocks."""

_HOST_PROCESS = int(4.0 * GIB)
"""What a process of a run takes on the host beside tensors."""
_HOST_COMPILERS = int(4.0 * GIB)
"""What those take that compile for a run."""
_PINNED = 1.24
"""What pinned buffers take of the host, in their sizes: torch rounds each up to a power of two."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    """A block's activations while it is differentiated, DeepSpeed's buffers, and the encoder of images."""
    context: int
    """What CUDA and NCCL take beside PyTorch."""

    @property
    def reserved(self) -> int:
        """What PyTorch reserves."""
        return self.card - self.context

    @property
    def card(self) -> int:
        """All of it."""
        return sum(int(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class Estimate:
    """What a run will take. Sizes in bytes."""

    memory: Memory
    """Of each GPU."""
    host: int
    """Memory of one machine's processes together."""
    cache_per_sample: int
    checkpoint: int
    """One checkpoint on disk."""
    flops: float
    """Floating-point operations of one optimizer step, of one GPU, recomputed ones included."""
    seconds: float | None
    """Of one optimizer step, where the GPU is known."""
    arrangement: Arrangement | None = None
    """Of the memory engine, where the run uses it."""


def lora_parameters(spec: ModelSpec, config: RunConfig) -> int:
    """Return numbers in the run's adapter."""
    return config.rank * sum(map(sum, targeted(spec, config.target_modules).values()))


def estimate(
    config: RunConfig,
    spec: ModelSpec,
    *,
    gpu: str = "",
    alone: bool = False,
    arrangement: Arrangement | None = None,
) -> Estimate:
    """Return what a run of ``config`` on a model built like ``spec`` will take.

    Args:
        gpu: name of the GPU, for the time.
        alone: without NCCL's memory, for one process that is measured without the others.
        arrangement: of the memory engine; planned here when not given, for a run that uses it.
    """
    if config.uses_engine and config.may_use_engine:
        return _with_engine(config, spec, gpu, arrangement or plan_arrangement(config, spec, gpu=gpu)[0])
    memory = _memory(config, spec)
    return Estimate(
        memory=replace(memory, context=CONTEXT) if alone else memory,
        host=_host(config, spec),
        cache_per_sample=_cache(config, spec),
        checkpoint=_checkpoint(config, spec),
        flops=_flops(config, spec),
        seconds=seconds_of_step(config, spec, gpu),
    )


def _with_engine(config: RunConfig, spec: ModelSpec, gpu: str, arrangement: Arrangement) -> Estimate:
    work, speed = workload(config, spec), speed_of(gpu)
    parts = arrangements.card_memory(work, arrangement)
    adapter = 0 if work.trains_blocks else lora_parameters(spec, config) * 4
    memory = Memory(
        weights=parts.weights + adapter,
        gradients=work.gradients,
        optimizer=work.trained - adapter,
        activations=parts.activations,
        workspace=parts.workspace,
        context=work.context,
    )
    timed = speed is not None and config.precision != "fp32" and not work.trains_blocks  # of which none was measured
    return Estimate(
        memory=memory,
        host=_host(config, spec) + arrangements.host_bytes(work, arrangement, config.local_processes),
        cache_per_sample=_cache(config, spec),
        checkpoint=_checkpoint(config, spec),
        flops=_flops(config, spec),
        seconds=arrangements.seconds(work, arrangement, speed) if speed is not None and timed else None,
        arrangement=arrangement,
    )


def plan_arrangement(
    config: RunConfig, spec: ModelSpec, *, gpu: str = "", kernel: AttentionKernel | None = None
) -> tuple[Arrangement, bool]:
    """Return the arrangement of a run that uses the memory engine, and whether its estimate fits the run's budget.

    Args:
        gpu: name of the GPU; of an unknown one the speed is assumed to be that of a 4090.
        kernel: the attention kernel that was measured to be the fastest, where the run leaves it open.
    """
    given = config.attention if config.attention != "auto" else None
    keep = config.keep_activations or (None if config.gradient_checkpointing else "everything")
    wanted = RequestedArrangement(
        streamed_blocks=spec.num_layers if config.sharding.streams else config.stream_blocks,
        keep=keep,
        kept_whole=config.keep_everything,
        offloaded_blocks=config.offload_activations,
        attention=given or kernel,
    )
    work, host = workload(config, spec), None
    if config.vram_bytes is None:
        return arrangements.unplanned(work, wanted), True
    if config.host_memory_bytes is not None and not work.trains_blocks:
        host = HostRoom(config.host_memory_bytes - _host(config, spec), config.local_processes)
    return arrangements.arrange(work, config.vram_bytes, speed_of(gpu) or SPEEDS["4090"], wanted, host)


def check_arrangement(config: RunConfig, spec: ModelSpec, gpu: str = "") -> None:
    """Refuse a budget that no arrangement fits, of the GPU's memory or of the host's.

    Raises:
        UsageError: with what would be the least.
    """
    if not config.uses_engine:
        return
    arrangement, fits = plan_arrangement(config, spec, gpu=gpu)
    if fits and config.host_memory_bytes is not None and not config.sharding.streams:
        host = estimate(config, spec, arrangement=arrangement).host
        if host > config.host_memory_bytes:
            raise too_little_host_memory(config, host)
    if not fits:
        least = arrangements.card_bytes(workload(config, spec), arrangement) / (1 - arrangements.MARGIN)
        raise UsageError(
            f"--vram {config.vram} is not enough: this run is estimated to need at least {least / 1e9:.1f} GB",
            f"use --vram {least / 1e9 + 0.05:.1f}GB, or a smaller --size, --rank or --batch-size",
        )


def too_little_host_memory(config: RunConfig, needed: int) -> UsageError:
    """Return the error of a run that is estimated to need ``needed`` bytes of the host, more than its budget."""
    return UsageError(
        f"--host-memory {config.host_memory} is not enough: this run is estimated to need at least "
        f"{needed / GIB:.1f} GiB",
        f"use --host-memory {needed / GIB + 0.05:.1f}GiB, or fewer processes, or --vram for more on the GPU",
    )


def workload(config: RunConfig, spec: ModelSpec) -> Workload:
    """Return what of a step does not depend on the memory engine's arrangement."""
    item = BYTES[config.precision]
    width = spec.num_attention_heads * spec.attention_head_dim
    whole, adapter = transformer_parameters(spec), 0 if config.sharding.streams else lora_parameters(spec, config)
    block = block_parameters(spec)
    tokens = tokens_of(config, spec)
    extra = VAE_PARAMETERS * item if spec.image_to_video else 0
    if config.precision == "fp16":
        extra += int(_ENGINE_WORK_FP16 * tokens * width * item)
    frozen = Workload(
        blocks=spec.num_layers,
        block_weights=block * item,
        block_stored=int(block * (STORED_BYTES[config.stored_precision] if config.stored_precision else item)),
        other_weights=(whole - spec.num_layers * block) * item,
        trained=adapter * (4 + OPTIMIZERS[config.optimizer].state_bytes),
        gradients=adapter * 4 * (2 if config.num_processes > 1 else 1),
        tensor=tokens * width * item,
        numbers=tokens * width * spec.num_layers,
        linear_flops=2.0 * whole * tokens,
        attention_flops=4.0 * tokens * (tokens / config.batch_size) * width * spec.num_layers,
        passes=config.gradient_accumulation_steps,
        extra=extra,
        context=_context(config) + PINNING,
        compiled=config.compiles_blocks() and not config.dora,  # PEFT's DoRA stops the tracer inside of a checkpoint
        float8=config.base_precision == "fp8",
    )
    if not config.sharding.streams:
        return frozen
    if not spec.rotary:
        frozen = replace(frozen, other_weights=frozen.other_weights + frozen.tensor // config.batch_size)  # positions
    rest = whole - spec.num_layers * block
    return trained_weights(frozen, config, Numbers(block=block, rest=rest, largest=4 * width**2))


def _memory(config: RunConfig, spec: ModelSpec) -> Memory:
    item, ranks = BYTES[config.precision], config.num_processes
    whole = transformer_parameters(spec)
    trained = lora_parameters(spec, config) if config.type == "lora" else whole
    tensor = tokens_of(config, spec) * spec.num_attention_heads * spec.attention_head_dim * item
    inputs = spec.num_layers * tensor * (1 if config.gradient_checkpointing else _KEPT_A_BLOCK)
    work = tensor * (_work_tensors(config) + (_WORK_FP16 if config.precision == "fp16" else 0))
    if spec.image_to_video:
        work += VAE_PARAMETERS * item
    if not config.sharding.uses_deepspeed:
        weights = whole * item + trained * 4 if config.type == "lora" else whole * 4
        gradients = trained * 4 * (2 if ranks > 1 else 1)  # DDP's buckets are copies
        optimizer = trained * OPTIMIZERS[config.optimizer].state_bytes
        casts = 0 if config.precision == "fp32" else trained * item  # autocast keeps them up to the end of the forward
        kept = max(inputs + casts - gradients, 0)  # gradients come as activations go
        return Memory(weights, gradients, optimizer, int(kept), int(work), _context(config))
    offload = config.sharding.offloads
    frozen = whole - trained if config.type == "lora" else 0
    optimizer = 0 if offload else trained * (4 + OPTIMIZERS[config.optimizer].state_bytes) // ranks
    gradients = 0 if offload else trained * item // ranks
    full = REDUCE_BUCKET[config.sharding.zero_stage]
    bucket = 2 * full * item
    if config.sharding.shards_weights:
        shard = 0 if offload else (frozen + trained) * item // ranks
        weights = shard + min(_LIVE_PARAMETERS, whole) * item
        idle = _IDLE_ZERO3 * whole * item / spec.num_layers
        # Of the inputs, what is still there when the first bucket is full and room is made for the gradients.
        left = inputs * (1 - min(1, full / trained))
        step = 0 if offload else trained * 4 // ranks  # the fp32 copy of the gradients that the optimizer takes
        kept = max(inputs + bucket, left + bucket + gradients, gradients + step - work)
    else:
        bucket = bucket if offload else 2 * min(full, trained) * item  # without offload it is the gradients themselves
        weights, idle = (frozen + trained) * item, _IDLE_ZERO2 * (bucket + gradients)
        before = gradients if config.gradient_accumulation_steps > 1 else 0  # of the passes before
        group = min(largest_group(trained, ranks), trained)
        # A group's gradients are copied, and copied into fp32; at the start its weights, where nothing else is yet.
        step = 0 if offload else group * (item + (4 if item < 4 else 0)) // ranks
        start = group * item - optimizer
        kept = max(before + max(inputs, gradients) + bucket, gradients + step - work, start - work)
    kept = max(kept - gradients, 0)
    return Memory(weights, gradients, optimizer, int(kept), int(work + idle), _context(config))


def _work_tensors(config: RunConfig) -> float:
    if config.compiles_blocks():
        return _WORK_COMPILED
    return _WORK_ZERO3 if config.sharding.shards_weights else _WORK_EAGER


def _context(config: RunConfig) -> int:
    if config.num_processes > 1:
        return CONTEXT + _NCCL
    return CONTEXT + (_NCCL_ALONE if config.sharding.uses_deepspeed else 0)


def _host(config: RunConfig, spec: ModelSpec) -> int:
    """Return bytes on one machine that cannot be dropped; weights read as they are stand in mapped files, which can."""
    item, ranks = BYTES[config.precision], config.local_processes
    whole = transformer_parameters(spec)
    trained = lora_parameters(spec, config) if config.type == "lora" else whole
    in_fp32 = config.type == "sft" and not config.sharding.uses_deepspeed
    as_stored = config.precision == spec.variant.trained_in or in_fp32
    loaded = 0 if as_stored else whole * item * ranks  # read as another type: a copy
    kept = trained * OPTIMIZERS[config.optimizer].host_bytes * ranks
    if config.sharding.offloads:
        share = ranks / config.num_processes
        kept = int(trained * (16 + item) * share)  # weights and gradients in fp32, two moments, and the new weights
        if config.sharding.shards_weights:  # which pins its weights in any case
            kept = int((_PINNED if config.pin_memory else 1) * kept + _PINNED * whole * item * share)
        elif config.gradient_accumulation_steps > 1:
            kept += int((_pinned_gradients(config, spec) if config.pin_memory else trained * item) * share)
    return _HOST_COMPILERS + ranks * _HOST_PROCESS + max(loaded, kept)


def _pinned_gradients(config: RunConfig, spec: ModelSpec) -> int:
    """Return bytes of ZeRO-2's buffers for accumulated gradients: pinned, one for each matrix, each of a power of
    two."""
    if config.type == "lora":
        sizes = [config.rank * one for both in targeted(spec, config.target_modules).values() for one in both]
    else:
        sizes = [inputs * outputs for inputs, outputs in layers(spec).values()]
    return sum(1 << (size * BYTES[config.precision] - 1).bit_length() for size in sizes)


def _cache(config: RunConfig, spec: ModelSpec) -> int:
    size, item = size_of(config, spec), BYTES[config.precision]
    area = (size.height // SPATIAL_COMPRESSION) * (size.width // SPATIAL_COMPRESSION)
    latents = 2 * spec.out_channels * latent_frames(size.num_frames) * area * item
    text = spec.max_text_seq_length * spec.text_embed_dim * item
    image = 3 * size.height * size.width if spec.image_to_video else 0
    return latents + text + image


def _checkpoint(config: RunConfig, spec: ModelSpec) -> int:
    if config.sharding.streams:
        return checkpoint_bytes(config, transformer_parameters(spec))
    if config.type == "lora":
        return lora_parameters(spec, config) * (4 + (12 if config.sharding.uses_deepspeed else 8))
    copies = BYTES[config.precision] + 12 if config.sharding.uses_deepspeed else 4 + 8
    return transformer_parameters(spec) * copies


def _flops(config: RunConfig, spec: ModelSpec) -> float:
    matmul, attention = flops_of_step(config, spec)
    return matmul + attention
