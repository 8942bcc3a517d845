"""A run's memory engine: its arrangement planned for this machine's GPU, within the run's budget."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel

from cogtune.config.arrangement import Arrangement, AttentionKernel
from cogtune.modeling.devices import DTYPES
from cogtune.modeling.engine import attach
from cogtune.modeling.engine.attention import FLASH_4, fastest, has_flash_4
from cogtune.modeling.engine.engine import blocks_of
from cogtune.modeling.engine.float8 import use_float8
from cogtune.modeling.engine.machine_group import MachineGroup
from cogtune.modeling.engine.streamed_parameters import StreamedParameters
from cogtune.models.download import home
from cogtune.models.geometry import video_tokens
from cogtune.planning.estimate import estimate, plan_arrangement
from cogtune.run.plan import Plan, size_of
from cogtune.system import console
from cogtune.system.errors import UsageError
from cogtune.training.stream import stream_weights


def attach_engine(
    plan: Plan, transformer: CogVideoXTransformer3DModel, accelerator: Accelerator, *, compiled: bool
) -> tuple[Arrangement, StreamedParameters | None]:
    """Attach a memory engine to the transformer and limit PyTorch's memory to the budget.

    Returns:
        The arrangement, and under strategy ``stream`` the trained weights.

    Raises:
        UsageError: the requested attention kernel, or fp8, cannot be used here.
    """
    config, spec, device = plan.config, plan.spec, accelerator.device
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # with its number, which a limit on memory needs
    if config.base_precision == "fp8":
        use_float8(blocks_of(transformer), dtype=DTYPES[config.precision], device=device)
    kernel = _kernel(plan, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    arrangement, _ = plan_arrangement(config, spec, gpu=name, kernel=kernel)
    if config.vram_bytes is not None and device.type == "cuda":
        context = estimate(config, spec, arrangement=arrangement).memory.context
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (config.vram_bytes - context) / total), device)
    console.note(arrangement.describe(spec.num_layers))
    several = accelerator.num_processes > 1 and config.local_processes > 1  # a bench measures one of several alone
    trained = None
    if config.sharding.streams:
        trained = stream_weights(plan, transformer, accelerator, slots=arrangement.slots)
    attach(
        transformer,
        arrangement,
        device=device,
        kernel=arrangement.attention,
        backend="inductor" if compiled else None,
        tell=console.warn,
        trained=trained,
        group=MachineGroup(accelerator.process_index, config.local_processes) if several else None,
        stored=config.stored_precision,
    )
    # DDP would send every process the slots' content, whichever blocks they hold. It leaves all frozen weights of
    # blocks alone, since machines with other GPUs may stream other blocks.
    transformer._ddp_params_and_buffers_to_ignore = [
        name
        for name, parameter in transformer.named_parameters()
        if name.startswith("transformer_blocks.") and not parameter.requires_grad
    ]
    return arrangement, trained


def _kernel(plan: Plan, device: torch.device) -> AttentionKernel | None:
    """Return the attention kernel to use: the requested one, or the fastest for the run's largest samples."""
    config, spec = plan.config, plan.spec
    if config.attention is not None and config.attention != "auto":
        if config.attention == FLASH_4 and not has_flash_4():
            raise UsageError(
                "--attention flash-attn-4: the package is not installed, or has no backward pass for this GPU",
                "run `pip install 'cogtune[flash-attn-4]'`, or remove --attention",
            )
        return config.attention if device.type == "cuda" else None
    if config.attention is None and config.vram_bytes is None:
        return None
    dtype = DTYPES[config.precision]
    tokens = video_tokens(size_of(config, spec), spec.patch_size, spec.patch_size_t) + spec.max_text_seq_length
    shape = (config.batch_size, spec.num_attention_heads, tokens, spec.attention_head_dim)
    return fastest(shape, dtype, device, home() / "attention.json")
