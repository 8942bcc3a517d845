"""A bare training program with FSDP2 on CPUs, as anyone might write it; it does not use cogtune.

Its processes have the environment that ``torchrun`` gives them. It trains a small CogVideoX transformer on every
process, saves it by what ``Accelerator.save_state`` calls in each of its formats, and with
``torch.distributed.checkpoint`` alone, and leaves beside every checkpoint what the ranks held at that moment
(``held.safetensors``: full values). (Accelerate itself takes FSDP for GPUs alone.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.zero_script import STEPS, lora_model, loss_of, new_model


def train(output: Path, make: Callable[[], Any], names: dict[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Train for a few steps, then save: a name for each format."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    model, mesh = make().to(dtype), init_device_mesh("cpu", (accelerator.num_processes,))
    for block in (*model.transformer_blocks, model):
        fully_shard(block, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        loss_of(model, step, accelerator.process_index, dtype).backward()
        optimizer.step()
        optimizer.zero_grad()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for saved_as, name in names.items():
        folder = output / name
        if saved_as == "dcp":
            state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
            save({**state, "step": STEPS}, checkpoint_id=folder)
        else:
            plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=saved_as)
            save_fsdp_model(plugin, accelerator, model, str(folder))
            save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
        if accelerator.is_main_process:
            save_file(
                {key: value.contiguous().clone() for key, value in full.items() if isinstance(value, torch.Tensor)},
                folder / "held.safetensors",
            )


def main(output: Path) -> None:
    """Train the whole model and a LoRA."""
    if int(os.environ["RANK"]) == 0:
        new_model().save_pretrained(output / "base")
    train(output, new_model, {"SHARDED_STATE_DICT": "sharded", "FULL_STATE_DICT": "full", "dcp": "dcp"})
    train(output, new_model, {"SHARDED_STATE_DICT": "sharded-bf16"}, torch.bfloat16)
    train(output, lora_model, {"SHARDED_STATE_DICT": "lora", "FULL_STATE_DICT": "lora-full"})
