"""Which options of training go together, looked at before anything is downloaded, encoded or launched."""

from __future__ import annotations

import importlib.util

from cogtune.config.optimizers import OPTIMIZERS, goes_with
from cogtune.config.run_config import RunConfig, tagged
from cogtune.models import layers
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.system.errors import did_you_mean

EXTRA = "pip install 'cogtune[optimizers]'"


_WITHOUT_WARMUP = ("constant", "piecewise_constant")


def problems_of_training(config: RunConfig, spec: ModelSpec) -> list[str]:
    """Return everything about optimizer, schedule, timesteps and adapter that cannot be done, in words."""
    return [
        *_optimizer_problems(config),
        *_schedule_problems(config),
        *_objective_problems(config, spec),
        *(f"sample_steps {problem}" for problem in spec.steps_problems(config.sample_steps)),
        *_adapter_problems(config, spec),
        *_engine_problems(config, spec),
    ]


def _optimizer_problems(config: RunConfig) -> list[str]:
    needs = OPTIMIZERS[config.optimizer]
    problems = []
    if not goes_with(config.optimizer, config.strategy):
        problems.append(
            f"optimizer {config.optimizer} does not go with strategy {config.strategy}: {needs.not_under_zero}"
        )
    if needs.module and importlib.util.find_spec(needs.module) is None:
        problems.append(f"optimizer {config.optimizer} needs {needs.package}, which is not installed: {EXTRA}")
    return problems


def _schedule_problems(config: RunConfig) -> list[str]:
    name, problems = config.lr_scheduler, []
    if config.warmup_steps and name in _WITHOUT_WARMUP:
        problems.append(f"lr_scheduler {name} has no warm-up: leave warmup_steps out, or use constant_with_warmup")
    if name == "piecewise_constant" and config.lr_pieces is None:
        problems.append("lr_scheduler piecewise_constant needs lr_pieces, such as 1:100,0.1:200,0.01")
    if name != "piecewise_constant" and config.lr_pieces is not None:
        problems.append(f"lr_pieces is for lr_scheduler piecewise_constant, and this is {name}")
    if name == "polynomial" and config.learning_rate <= POLYNOMIAL_END:
        problems.append(
            f"learning_rate {config.learning_rate:g} is not above {POLYNOMIAL_END:g}, where polynomial ends"
        )
    return problems


POLYNOMIAL_END = 1e-7
"""The learning rate at which diffusers' polynomial schedule ends."""


def _objective_problems(config: RunConfig, spec: ModelSpec) -> list[str]:
    bounds, last = config.timestep_bounds, spec.num_train_timesteps - 1
    if bounds is not None and not 0 <= bounds[0] <= bounds[1] <= last:
        return [f"timestep_range {config.timestep_range}: LOW and HIGH have to rise and lie in 0 to {last}"]
    return []


def _engine_problems(config: RunConfig, spec: ModelSpec) -> list[str]:
    if not config.uses_engine:
        return []
    problems = []
    given = ", ".join(key for key in tagged("engine") if getattr(config, key) is not None)
    if config.type != "lora":
        problems.append(f"{given}: for type lora, and this is {config.type}")
    if config.sharding.uses_deepspeed:
        problems.append(f"{given}: for strategy ddp, and this is {config.strategy}")
    if config.dora and config.compile:
        problems.append(f"compile: DoRA's layers cannot be compiled with {given}; leave it out")
    for key in ("stream_blocks", "keep_everything", "offload_activations"):
        value = getattr(config, key)
        if value is not None and value > spec.num_layers:
            problems.append(f"{key} {value}: {spec.variant.name} has {spec.num_layers} blocks")
    if config.keep_everything and config.offload_activations:
        both = config.keep_everything + config.offload_activations
        if both > spec.num_layers:
            problems.append(
                f"keep_everything {config.keep_everything} and offload_activations {config.offload_activations} "
                f"are {both} blocks together, and {spec.variant.name} has {spec.num_layers}"
            )
    return problems


def _adapter_problems(config: RunConfig, spec: ModelSpec) -> list[str]:
    if config.type != "lora":
        return []
    known = layers.names(spec)
    return [
        f"target_modules {target}: no layer's name ends so{did_you_mean(target, known)}; there are {', '.join(known)}"
        for target in config.target_modules
        if not layers.targeted(spec, [target])
    ]
