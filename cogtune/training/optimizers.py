"""The optimizer and the learning rate, which is a function of the step number and has no state of its own."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer

from cogtune import console
from cogtune.config import OptimizerName, RunConfig
from cogtune.training.kernels import building
from cogtune.training.offload import HostAdamW

Parameters = list[torch.nn.Parameter]


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: RunConfig) -> Optimizer:
    """The configured optimizer over those ``parameters`` that are trained.

    Under a strategy that keeps its state on the CPU, Adam and AdamW run by DeepSpeed's kernel. Where that does not
    build (it needs a compiler), torch's own do the same arithmetic, slower.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if config.strategy.endswith("-offload"):
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            with building():
                optimizer: Optimizer = DeepSpeedCPUAdam(
                    trainable, adamw_mode=config.optimizer == "adamw", **_adam_settings(config)
                )
            return optimizer
        except Exception as error:
            console.note(f"DeepSpeed's CPU Adam did not build ({error}); torch's own is used, which is slower")
    return _BUILDERS[config.optimizer](trainable, config)


def _adam_settings(config: RunConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }


def _adamw(trainable: Parameters, config: RunConfig) -> Optimizer:
    # Fused: one pass over each weight, and on a GPU no temporary copy of them all.
    return torch.optim.AdamW(trainable, fused=True, **_adam_settings(config))


def _adam(trainable: Parameters, config: RunConfig) -> Optimizer:
    return torch.optim.Adam(trainable, fused=True, **_adam_settings(config))


def _prodigy(trainable: Parameters, config: RunConfig) -> Optimizer:
    from prodigyopt import Prodigy

    with contextlib.redirect_stdout(io.StringIO()):  # it prints, and stdout is the run's own
        optimizer: Optimizer = Prodigy(
            trainable,
            beta3=config.beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
            **_adam_settings(config),
        )
    return optimizer


def _came(trainable: Parameters, config: RunConfig) -> Optimizer:
    from came_pytorch import CAME

    third = 0.9999 if config.beta3 is None else config.beta3
    optimizer: Optimizer = CAME(
        trainable,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2, third),
        weight_decay=config.weight_decay,
    )
    return optimizer


def _adamw_8bit(trainable: Parameters, config: RunConfig) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(trainable, **_adam_settings(config))
    return optimizer


def _adamw_offload(trainable: Parameters, config: RunConfig) -> Optimizer:
    return HostAdamW(trainable, **_adam_settings(config))


_BUILDERS: dict[OptimizerName, Callable[[Parameters, RunConfig], Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "prodigy": _prodigy,
    "came": _came,
    "adamw-8bit": _adamw_8bit,
    "adamw-offload": _adamw_offload,
}


def learning_rate_at(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step ``step`` (the first is 0), by diffusers' schedules."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=config.learning_rate)
    scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        step_rules=config.lr_pieces,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=total_steps,
        num_cycles=config.lr_cycles,
        power=config.lr_power,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))
