"""Checkpoints: written aside and renamed, so that a folder called ``checkpoint-N`` is always whole."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import CogVideoXTransformer3DModel
from safetensors import SafetensorError
from torch import Tensor

from cogtune.checkpoints import FORMAT, STATE_NAME, checkpoints
from cogtune.errors import CogtuneError
from cogtune.files import explained, partial_folder, partial_path, publish_folder, remove_folder, write_json
from cogtune.modeling.adapters import load_lora, save_lora
from cogtune.models import LORA_WEIGHTS_NAME

OPTIMIZER_NAME = "optimizer.pt"
ZERO_TAG = "pytorch_model"
"""Folder of the ZeRO shards in a checkpoint; the name accelerate's ``save_state`` gives it."""


@dataclass(frozen=True)
class Trainee:
    """What a checkpoint is a checkpoint of."""

    accelerator: Accelerator
    model: Any
    """The prepared model: the transformer, or DDP or a DeepSpeed engine around it."""
    transformer: CogVideoXTransformer3DModel
    optimizer: Any
    is_lora: bool

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed holds the weights and the optimizer in shards."""
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)


def whole_trainables(trainee: Trainee) -> dict[str, Tensor]:
    """The trainable weights by name, on the CPU, gathered from all ranks. Collective: every rank calls it."""
    if not trainee.is_zero:
        return {name: p.detach().cpu() for name, p in trainee.transformer.named_parameters() if p.requires_grad}
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in trainee.transformer.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
            if trainee.accelerator.is_main_process:
                weights[name] = full.cpu()
    return weights


def save(trainee: Trainee, output: Path, step: int, facts: Mapping[str, Any], *, keep: int) -> None:
    """Write ``checkpoint-<step>`` and delete all but the newest ``keep``. Collective: every rank calls it.

    It holds the weights (LoRA in the diffusers format), the optimizer and ``state.json`` with ``facts``.

    Raises:
        CogtuneError: it cannot be written; earlier checkpoints are untouched.
    """
    accelerator = trainee.accelerator
    target = output / f"checkpoint-{step}"
    aside = partial_path(target)
    if accelerator.is_main_process:
        partial_folder(target)
    accelerator.wait_for_everyone()
    if trainee.is_zero:
        try:
            with explained(target):
                trainee.model.save_checkpoint(str(aside), tag=ZERO_TAG, exclude_frozen_parameters=trainee.is_lora)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    weights = whole_trainables(trainee) if trainee.is_lora else {}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            if trainee.is_lora:
                save_lora(aside / LORA_WEIGHTS_NAME, trainee.transformer, facts, weights)
            elif not trainee.is_zero:
                with explained(target):
                    trainee.transformer.save_pretrained(aside / "transformer")
            if not trainee.is_zero:
                _save_optimizer(trainee, aside / OPTIMIZER_NAME)
            write_json(aside / STATE_NAME, {"format": FORMAT, "step": step, **facts})
            publish_folder(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for old in checkpoints(output)[:-keep]:
            remove_folder(old)
    accelerator.wait_for_everyone()


def _save_optimizer(trainee: Trainee, path: Path) -> None:
    scaler = trainee.accelerator.scaler
    state = {"optimizer": trainee.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
    with explained(path):
        torch.save(state, path)


def load(trainee: Trainee, checkpoint: Path) -> None:
    """Put a checkpoint's weights and optimizer back. Collective: every rank calls it.

    Raises:
        CogtuneError: a file is missing or damaged.
    """
    try:
        if trainee.is_zero:
            loaded, _ = trainee.model.load_checkpoint(
                str(checkpoint), tag=ZERO_TAG, load_module_strict=not trainee.is_lora
            )
            if loaded is None:
                raise CogtuneError(f"{checkpoint} has no ZeRO shards", "resume from another checkpoint")
            return
        if trainee.is_lora:
            load_lora(checkpoint / LORA_WEIGHTS_NAME, trainee.transformer)
        else:
            saved = CogVideoXTransformer3DModel.from_pretrained(checkpoint / "transformer")
            trainee.transformer.load_state_dict(saved.state_dict())
        state = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        trainee.optimizer.load_state_dict(state["optimizer"])
        if trainee.accelerator.scaler is not None and state["scaler"]:
            trainee.accelerator.scaler.load_state_dict(state["scaler"])
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise CogtuneError(
            f"{checkpoint} is damaged: {str(error).splitlines()[0]}", "resume from an earlier checkpoint"
        ) from error
