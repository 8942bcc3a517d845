"""The optimizer and the learning rate, which is a function of the step number and has no state of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from cogtune import console
from cogtune.config import RunConfig


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """AdamW over ``parameters``; on the CPU by DeepSpeed's kernel when the strategy keeps its state there.

    Where that kernel does not build (it needs a compiler), torch's own AdamW does the same arithmetic, slower.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.strategy.endswith("-offload"):
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(trainable, adamw_mode=True, **settings)
            return optimizer
        except Exception as error:
            console.note(f"DeepSpeed's CPU Adam did not build ({error}); torch's own is used, which is slower")
    # Fused: one pass over each weight, and on a GPU no temporary copy of them all.
    return torch.optim.AdamW(trainable, fused=True, **settings)


def learning_rate_at(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of optimizer step ``step`` (the first is 0), by diffusers' schedules."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))
