"""Which training options can be combined, checked before anything is downloaded, encoded or launched."""

from __future__ import annotations

import importlib.util

from cogtune.config.groups.training import VRAM_OFF
from cogtune.config.optimizers import OPTIMIZERS, why_not_with
from cogtune.config.run_config import RunConfig, tagged
from cogtune.models import layers
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.system.errors import did_you_mean

EXTRA = "pip install 'cogtune[optimizers]'"


_WITHOUT_WARMUP = ("constant", "piecewise_constant")


def problems_of_training(config: RunConfig, spec: ModelSpec) -> list[str]:
    """List every invalid combination of optimizer, schedule, timestep and adapter options, as text."""
    return [
        *_optimizer_problems(config),
        *_schedule_problems(config),
        *_objective_problems(config, spec),
        *(f"sample_steps {problem}" for problem in spec.steps_problems(config.sample_steps)),
        *_adapter_problems(config, spec),
        *_engine_problems(config, spec),
        *_stream_problems(config),
    ]


def _optimizer_problems(config: RunConfig) -> list[str]:
    needs = OPTIMIZERS[config.optimizer]
    problems = []
    if why := why_not_with(config.optimizer, config.strategy):
        problems.append(f"optimizer {config.optimizer} cannot be used with strategy {config.strategy}: {why}")
    if needs.module and importlib.util.find_spec(needs.module) is None:
        problems.append(f"optimizer {config.optimizer} requires {needs.package}, which is not installed; run `{EXTRA}`")
    if config.ema is not None and config.sharding.uses_deepspeed:
        problems.append(f"ema: only supported for strategies ddp and stream, not {config.strategy}")
    return problems


def _schedule_problems(config: RunConfig) -> list[str]:
    name, problems = config.lr_scheduler, []
    if config.warmup_steps and name in _WITHOUT_WARMUP:
        problems.append(f"lr_scheduler {name} has no warm-up; remove warmup_steps, or use constant_with_warmup")
    if name == "piecewise_constant" and config.lr_pieces is None:
        problems.append("lr_scheduler piecewise_constant requires lr_pieces, such as 1:100,0.1:200,0.01")
    if name != "piecewise_constant" and config.lr_pieces is not None:
        problems.append(f"lr_pieces requires lr_scheduler piecewise_constant, not {name}")
    if name == "polynomial" and config.learning_rate <= POLYNOMIAL_END:
        problems.append(
            f"learning_rate {config.learning_rate:g} must be greater than {POLYNOMIAL_END:g}, where polynomial ends"
        )
    return problems


POLYNOMIAL_END = 1e-7
"""The learning rate at which diffusers' polynomial schedule ends."""


def _objective_problems(config: RunConfig, spec: ModelSpec) -> list[str]:
    bounds, last = config.timestep_bounds, spec.num_train_timesteps - 1
    if bounds is not None and not 0 <= bounds[0] <= bounds[1] <= last:
        return [f"timestep_range {config.timestep_range}: LOW must be below HIGH, and both must be in 0 to {last}"]
    return []


def _engine_problems(config: RunConfig, spec: ModelSpec) -> list[str]:
    if not config.uses_engine:
        return []
    problems = []
    keys = [key for key in tagged("engine") if getattr(config, key) not in (None, VRAM_OFF)]
    if config.type != "lora" and "base_precision" in keys:  # which has words of its own
        keys.remove("base_precision")
        problems.append("base_precision: only supported for type lora, whose base model is frozen")
    given = ", ".join(keys)
    if config.vram == VRAM_OFF:
        problems.append(f"vram off: cannot be used with {given or f'strategy {config.strategy}'}")
    if config.type != "lora" and not config.sharding.streams and given:
        problems.append(f"{given}: only supported for type lora or strategy stream, not {config.type}")
    if config.sharding.uses_deepspeed and given:
        problems.append(f"{given}: only supported for strategies ddp and stream, not {config.strategy}")
    if config.dora and config.compile:
        problems.append(f"compile: DoRA layers cannot be compiled with {given}; remove compile, or set vram to off")
    if config.base_precision is not None:
        problems += _base_precision_problems(config)
    for key in ("stream_blocks", "keep_everything", "offload_activations"):
        value = getattr(config, key)
        if value is not None and value > spec.num_layers:
            problems.append(f"{key} {value}: {spec.variant.name} has only {spec.num_layers} blocks")
    if config.keep_everything and config.offload_activations:
        both = config.keep_everything + config.offload_activations
        if both > spec.num_layers:
            problems.append(
                f"keep_everything {config.keep_everything} and offload_activations {config.offload_activations} "
                f"add up to {both} blocks, but {spec.variant.name} has {spec.num_layers}"
            )
    return problems


def _base_precision_problems(config: RunConfig) -> list[str]:
    if config.base_precision != "fp8":
        return []
    problems = []
    if config.dora:
        problems.append("base_precision fp8: not supported with dora, which reads the frozen weights in full precision")
    if config.precision == "fp32":
        problems.append("base_precision fp8: only supported for precision bf16 and fp16, not fp32")
    return problems


def _stream_problems(config: RunConfig) -> list[str]:
    if not config.sharding.streams:
        given = [key for key in tagged("stream") if getattr(config, key) is not None]
        if config.type == "lora" and config.strategy == "ddp" and "host_memory" in given:
            given.remove("host_memory")
            if config.vram == VRAM_OFF:
                return ["host_memory: cannot be used with vram off, which keeps everything on the GPU"]
        return [f"{', '.join(given)}: only supported for strategy stream, not {config.strategy}"] if given else []
    problems = []
    if config.type != "sft":
        problems.append(f"strategy stream: only supported for type sft, not {config.type}")
    if config.precision == "fp16":
        problems.append("precision fp16: not supported by strategy stream; use bf16")
    if config.num_machines > 1:
        problems.append(f"num_machines {config.num_machines}: strategy stream runs on one machine")
    if config.stream_blocks is not None:
        problems.append("stream_blocks: strategy stream streams every block; remove stream_blocks")
    if config.master_weights in ("split", "stochastic") and config.precision != "bf16":
        problems.append(
            f"master_weights {config.master_weights}: only supported for precision bf16, not {config.precision}"
        )
    return problems


def _adapter_problems(config: RunConfig, spec: ModelSpec) -> list[str]:
    if config.type != "lora":
        return []
    known = layers.names(spec)
    return [
        f"target_modules {target}: no layer has this name{did_you_mean(target, known)}; layers: {', '.join(known)}"
        for target in config.target_modules
        if not layers.targeted(spec, [target])
    ]
