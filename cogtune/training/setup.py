"""Setting up everything the training loop needs from a plan: model, adapter, optimizer, data, objective."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import CogVideoXTransformer3DModel

from cogtune import __version__
from cogtune.config.arrangement import Arrangement
from cogtune.config.launchers import mixed_precision, rendezvous_timeout
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.index import Index
from cogtune.data.cache.store import Store
from cogtune.data.prompts import load_prompts
from cogtune.modeling.adapters import add_lora, register_dora_with_deepspeed
from cogtune.modeling.devices import DTYPES
from cogtune.modeling.encoders import VideoEncoder
from cogtune.modeling.lora_files import initial_lora, start_from
from cogtune.models.locate import loading
from cogtune.run.checkpoints import check_fits, read_state
from cogtune.run.plan import Plan
from cogtune.system import console
from cogtune.system.errors import CogtuneError
from cogtune.training import checkpoint
from cogtune.training.checkpoint import TrainState
from cogtune.training.deepspeed_ops import load_collectives
from cogtune.training.ema import EMAWeights
from cogtune.training.evaluate import MOST_TRAINING_SAMPLES
from cogtune.training.loop import Training
from cogtune.training.machines import require_same_settings, require_shared_output
from cogtune.training.memory import attach_engine
from cogtune.training.monitor import EvalSchedule
from cogtune.training.objective import Objective, TimestepSampling
from cogtune.training.optimizers import build_optimizer
from cogtune.training.sample_signs import SampleSigns
from cogtune.training.sample_videos import ValidationVideos
from cogtune.training.stream import stored_dtype

_ENTRIES_IN_MEMORY = 2**29
"""Bytes of the cache that each process keeps in memory: all of it for small clips."""


def set_up(plan: Plan, stop: Callable[[], bool], *, base_dtype: torch.dtype | None = None) -> Training:
    """Load, resume and prepare everything a run needs. Collective: every process calls it.

    Args:
        stop: returns whether this process was asked to stop.
        base_dtype: dtype of the base's weights; by default what the run's type and strategy need.

    Raises:
        CogtuneError: the processes, the model, the cache or the checkpoint differ from the plan.
    """
    accelerator = _accelerator(plan)
    require_same_settings(plan)
    require_shared_output(accelerator, plan)
    train_state, arrangement = _train_state(plan, accelerator, base_dtype)
    store, index = Store(plan.config.cache_folder, in_memory=_ENTRIES_IN_MEMORY), Index.read(plan.index)
    validation = Index.read(plan.validation) if plan.validation else None
    return Training(
        train_state=train_state,
        objective=objective_of(
            plan, accelerator.device, DTYPES[plan.config.precision], store.read("text", index.null_text)
        ),
        store=store,
        index=index,
        config=plan.config,
        first_step=_resume(plan, train_state),
        total_steps=plan.total_steps,
        facts=facts_of(plan) | ({"validation": _about(validation)} if validation else {}),
        schedule=_eval_schedule(plan, store, index, validation),
        should_stop=lambda: _any_process(accelerator, stop()),
        arrangement=arrangement,
        # One more for each size, for no gradient, and for a first block that no gradient passes.
        most_graphs=8 * max(1, len(plan.buckets)) if _compiles_blocks(plan.config, accelerator) else None,
    )


def _accelerator(plan: Plan) -> Accelerator:
    config = plan.config
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    over_gloo = several and not torch.cuda.is_available()
    group = InitProcessGroupKwargs(
        backend="gloo" if over_gloo else "nccl", timeout=datetime.timedelta(minutes=config.nccl_timeout)
    )
    if config.sharding.uses_deepspeed:
        load_collectives()
    try:
        accelerator = Accelerator(
            cpu=over_gloo and not config.sharding.uses_deepspeed,
            # Under DeepSpeed its own file says so.
            mixed_precision=None if config.sharding.uses_deepspeed else mixed_precision(config),
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            kwargs_handlers=[group] if several else [],
        )
    except torch.distributed.DistError as error:  # the launchers have met, and then another machine's process died
        if config.num_machines == 1:
            raise
        raise rendezvous_timeout(config) from error
    if accelerator.num_processes != config.num_processes:
        raise CogtuneError(
            f"{accelerator.num_processes} processes were started, but the plan is for {config.num_processes}",
            "start the run with `cogtune train`, or with the plan's accelerate.yaml",
        )
    return accelerator


def _train_state(
    plan: Plan, accelerator: Accelerator, base_dtype: torch.dtype | None
) -> tuple[TrainState, Arrangement | None]:
    config, folder = plan.config, plan.base_model_dir / "transformer"
    is_lora = config.type == "lora"
    with loading(folder):
        if config.sharding.streams:
            transformer = CogVideoXTransformer3DModel.from_pretrained(folder, dtype=stored_dtype(folder))
        elif not config.sharding.uses_deepspeed and not is_lora and base_dtype is None:
            transformer = _load_as_fp32(folder, accelerator.device)
        else:
            dtype = base_dtype or DTYPES[config.precision]
            transformer = CogVideoXTransformer3DModel.from_pretrained(folder, dtype=dtype)
    if is_lora:
        add_lora(
            transformer,
            rank=config.rank,
            alpha=config.lora_alpha,
            target_modules=config.target_modules,
            seed=config.seed,
            dropout=config.lora_dropout,
            dora=config.dora,
            rslora=config.rslora,
        )
        if plan.resume is None and (lora := initial_lora(config, plan.spec)) is not None:
            start_from(transformer, lora)
    compiled = _compiles_blocks(config, accelerator)
    arrangement, streamed = None, None
    if config.uses_engine:
        arrangement, streamed = attach_engine(plan, transformer, accelerator, compiled=compiled)
    else:
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if compiled:
            for block in transformer.transformer_blocks:  # all alike: compiled once, and each weight keeps its name
                block.compile(dynamic=False)
    if streamed is not None:
        # Not moved, which could part the weights from their slots, nor wrapped in DDP: the engine reduces gradients.
        model = accelerator.prepare_model(transformer, device_placement=False, evaluation_mode=True)
        for module in transformer.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(accelerator.device))
        return TrainState(accelerator, model, transformer, None, is_lora, streamed), arrangement
    model, optimizer = accelerator.prepare(transformer, build_optimizer(transformer, config))
    if config.dora and config.sharding.shards_weights:
        register_dora_with_deepspeed(transformer)
    ema = None
    if config.ema is not None:
        trained = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
        ema = EMAWeights(trained, config.ema)
    return TrainState(accelerator, model, transformer, optimizer, is_lora, ema=ema), arrangement


def _compiles_blocks(config: RunConfig, accelerator: Accelerator) -> bool:
    on_gpu = accelerator.device.type == "cuda"
    return config.compiles_blocks(on_gpu=on_gpu) and not (config.uses_engine and config.dora)


def _load_as_fp32(folder: Path, device: torch.device) -> CogVideoXTransformer3DModel:
    """Load the base with fp32 weights on ``device``, as full training with DDP keeps them.

    They are read as they are stored, so that they stay in mapped files on the host instead of a copy per process.
    (DeepSpeed makes its own fp32 copies.)
    """
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder, dtype=stored_dtype(folder))
    for parameter in transformer.parameters():  # not the buffers: positions are in fp64
        parameter.data = parameter.data.to(device, torch.float32)
    return transformer


def _resume(plan: Plan, train_state: TrainState) -> int:
    """Load the checkpoint that the plan resumes from; return the number of steps done."""
    if plan.resume is None:
        return 0
    state = read_state(plan.resume)
    check_fits(plan.resume, state, plan.resume_fingerprint, model=plan.config.model, samples=plan.samples)
    checkpoint.load(train_state, plan.resume)
    console.note(f"resumed at step {state['step']} from {plan.resume}")
    return int(state["step"])


def objective_of(plan: Plan, device: torch.device, dtype: torch.dtype, null_text: torch.Tensor) -> Objective:
    """Return the loss of a run.

    Args:
        null_text: the empty caption's embedding, ``[L, D]``.
    """
    return Objective(
        plan.spec,
        plan.base_model_dir,
        null_text,
        seed=plan.config.seed,
        caption_dropout=plan.config.caption_dropout,
        device=device,
        dtype=dtype,
        image_encoder=VideoEncoder(plan.base_model_dir, device=device, dtype=dtype)
        if plan.spec.image_to_video
        else None,
        sampling=timestep_sampling_of(plan.config),
    )


def timestep_sampling_of(config: RunConfig) -> TimestepSampling:
    """Return the run's timestep and image noise distributions."""
    return TimestepSampling(
        timesteps=config.timestep_sampling,
        mean=config.timestep_mean,
        deviation=config.timestep_std,
        bounds=config.timestep_bounds,
        image_noise=config.image_noise_log,
    )


def _about(validation: Index) -> dict[str, Any]:
    return {"samples": len(validation.rows), "digest": validation.digest}


def _eval_schedule(plan: Plan, store: Store, index: Index, validation: Index | None) -> EvalSchedule:
    config = plan.config
    videos = _validation_videos(plan, store)
    measured = {"eval_loss": index.rows[:MOST_TRAINING_SAMPLES]}
    if validation is not None:
        measured["validation_loss"] = validation.rows
    return EvalSchedule(
        measured=measured,
        eval_every=config.eval_interval,
        validation_videos=videos,
        sample_every=config.sample_interval(*plan.buckets.values()),
        total_steps=plan.total_steps,
        new_signs_at=SampleSigns(plan, index, videos.prompts).new_at if videos else lambda _: (),
    )


def _validation_videos(plan: Plan, store: Store) -> ValidationVideos | None:
    if plan.prompts is None:
        return None
    config = plan.config
    prompts, null_text = load_prompts(plan.prompts)
    return ValidationVideos(
        prompts=prompts,
        null_text=null_text,
        store=store,
        base_model_dir=plan.base_model_dir,
        spec=plan.spec,
        size=plan.size,
        fps=plan.fps,
        dtype=DTYPES[config.precision],
        seed=config.seed,
        steps=config.sample_steps,
        guidance=config.sample_guidance,
        output=config.output,
    )


def _any_process(accelerator: Accelerator, mine: bool) -> bool:
    if accelerator.num_processes == 1:
        return mine
    total: torch.Tensor = accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum")
    return bool(total > 0)


def facts_of(plan: Plan) -> dict[str, Any]:
    """Return the metadata saved with the weights: enough to sample from them and to write their model card."""
    config = plan.config
    return {
        "format": 1,
        "version": __version__,
        "base_model": config.model,
        "model_path": str(plan.base_model_dir),
        "variant": plan.spec.variant.name,
        "type": config.type,
        "rank": config.rank,
        "alpha": config.lora_alpha,
        "target_modules": list(config.target_modules),
        "dora": config.dora,
        "rslora": config.rslora,
        "size": str(plan.size),
        "fps": plan.fps,
        "precision": config.precision,
        "id_token": config.id_token,
        "prompt": plan.prompt,
        "dataset": {"samples": plan.samples, "digest": plan.resume_fingerprint["data"]},
        "identity": dict(plan.resume_fingerprint),
    } | ({"init_lora": dict(plan.init_lora)} if plan.init_lora else {})
