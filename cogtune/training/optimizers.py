"""The optimizer, and the learning rate as a stateless function of the step number."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer

from cogtune.config.launchers import largest_group
from cogtune.config.optimizers import OptimizerName
from cogtune.config.run_config import RunConfig
from cogtune.system import console
from cogtune.training.deepspeed_ops import ADAM, building
from cogtune.training.offload import CPUOffloadAdamW

Groups = list[dict[str, Any]]
"""Parameter groups, as torch's optimizers take them."""


def build_optimizer(model: torch.nn.Module, config: RunConfig) -> Optimizer:
    """Build the configured optimizer over the trained parameters of ``model``.

    With a strategy that keeps its state on the CPU, Adam and AdamW use DeepSpeed's kernel. If that does not build (it
    needs a compiler), torch's optimizers do the same arithmetic more slowly.
    """
    trainable = _groups(model, config)
    if config.sharding.offloads:
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            with building(ADAM):
                optimizer: Optimizer = DeepSpeedCPUAdam(
                    trainable, adamw_mode=config.optimizer == "adamw", **_adam_settings(config)
                )
            return optimizer
        except Exception as error:
            console.note(f"DeepSpeed's CPU Adam failed to build ({error}); using torch's, which is slower")
    return _BUILDERS[config.optimizer](trainable, config)


def _groups(model: torch.nn.Module, config: RunConfig) -> Groups:
    """Return the trained parameters: one group, or under ZeRO-2 several, of consecutive ones.

    DeepSpeed's ZeRO-2 copies a group's weights when it starts, and its gradients, twice, when it steps. Each group more
    saves less of that, and makes parameters that two processes share, of which both keep the whole gradient.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.sharding.zero_stage != 2:
        return [{"params": trained}]
    most = largest_group(sum(parameter.numel() for parameter in trained), config.num_processes)
    groups: Groups = []
    room = 0
    for parameter in trained:
        if parameter.numel() > room:
            groups.append({"params": []})
            room = most
        groups[-1]["params"].append(parameter)
        room -= parameter.numel()
    return groups


def _adam_settings(config: RunConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }


def _adamw(trainable: Groups, config: RunConfig) -> Optimizer:
    # Fused: one pass over each weight, and on a GPU no temporary copy of them all.
    return torch.optim.AdamW(trainable, fused=True, **_adam_settings(config))


def _adam(trainable: Groups, config: RunConfig) -> Optimizer:
    return torch.optim.Adam(trainable, fused=True, **_adam_settings(config))


def _prodigy(trainable: Groups, config: RunConfig) -> Optimizer:
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


def _came(trainable: Groups, config: RunConfig) -> Optimizer:
    from came_pytorch import CAME

    third = 0.9999 if config.beta3 is None else config.beta3
    optimizer: Optimizer = CAME(
        trainable,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2, third),
        weight_decay=config.weight_decay,
    )
    return optimizer


def _adamw_8bit(trainable: Groups, config: RunConfig) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(trainable, **_adam_settings(config))
    return optimizer


def _adamw_offload(trainable: Groups, config: RunConfig) -> Optimizer:
    return CPUOffloadAdamW(trainable, **_adam_settings(config))


_BUILDERS: dict[OptimizerName, Callable[[Groups, RunConfig], Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "prodigy": _prodigy,
    "came": _came,
    "adamw-8bit": _adamw_8bit,
    "adamw-offload": _adamw_offload,
}


def learning_rate_at(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """Return the learning rate of optimizer step ``step`` (the first is 0), by diffusers' schedules."""
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
