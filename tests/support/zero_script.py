"""A bare accelerate + DeepSpeed training program, as anyone might write it; it does not use cogtune.

Its processes have the environment that ``accelerate launch`` gives them. It trains a small CogVideoX transformer
several ways under the stage that the DeepSpeed config names, saves each with ``Accelerator.save_state``, and leaves
beside every checkpoint what the ranks held at that moment (``held.safetensors``: full fp32 values).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from deepspeed.utils import safe_get_full_fp32_param
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 17,  # odd sizes, so that no partition divides evenly
    "time_embed_dim": 13,
    "max_text_seq_length": 5,
    "sample_height": 4,
    "sample_width": 4,
    "sample_frames": 9,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,  # a buffer that is saved with the weights
}
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
STEPS = 2


def new_model() -> CogVideoXTransformer3DModel:
    """The same model on every rank and in every call."""
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**CONFIG)


def lora_model() -> CogVideoXTransformer3DModel:
    """A frozen model with a trainable adapter."""
    model = new_model()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(init_lora_weights="gaussian", **LORA))
    return model


def loss_of(model: Any, step: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """A reproducible loss that gives every trainable parameter a gradient."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    latents = torch.randn(1, 3, 4, 4, 4, generator=generator).to(dtype)
    text = torch.randn(1, 5, 17, generator=generator).to(dtype)
    out = model(latents, text, torch.tensor([500]), return_dict=False)[0]
    loss: torch.Tensor = out.float().pow(2).mean()
    return loss


def held(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter in full as the ranks hold it: the fp32 master where there is one, and the buffers."""
    values = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if master is None:
            with deepspeed.zero.GatheredParameters([parameter]):
                master = parameter.detach().clone()
        values[name] = master.float().cpu().contiguous().clone()
    for name, buffer in engine.module.named_buffers():
        values[name] = buffer.detach().float().cpu().contiguous().clone()
    return values


def train(
    output: Path,
    make: Callable[[], Any],
    saves: dict[str, dict[str, Any]],
    *,
    bf16: bool = False,
    by_engine: bool = False,
) -> None:
    """Train for a few steps, then save one checkpoint for each name in ``saves``, with its arguments."""
    AcceleratorState._reset_state(reset_partial_state=False)
    gloo = InitProcessGroupKwargs(backend="gloo")
    if bf16:
        plugin = DeepSpeedPlugin()
        plugin.hf_ds_config.config["bf16"] = {"enabled": True}
        accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="bf16", kwargs_handlers=[gloo])
    else:
        accelerator = Accelerator(kwargs_handlers=[gloo])
    model = make()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in trainable if "norm" not in name and "lora_B" not in name],
            "weight_decay": 0.01,
        },
        {"params": [p for name, p in trainable if "norm" in name or "lora_B" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, optimizer = accelerator.prepare(model, optimizer)
    dtype = torch.bfloat16 if bf16 else torch.float32
    for step in range(STEPS):
        accelerator.backward(loss_of(engine, step, accelerator.process_index, dtype))
        optimizer.step()
        optimizer.zero_grad()
    values = held(engine)
    for name, arguments in saves.items():
        folder = output / name
        if by_engine:
            engine.save_checkpoint(str(folder), tag="pytorch_model", **arguments)
        else:
            accelerator.save_state(str(folder), **arguments)
        if accelerator.is_main_process:
            save_file(values, folder / "held.safetensors")
    accelerator.free_memory()
    engine.destroy()


def main(output: Path) -> None:
    """Train every case under the stage of the DeepSpeed config that accelerate was given."""
    if int(os.environ["RANK"]) == 0:
        new_model().save_pretrained(output / "base")
    train(output, new_model, {"sft": {}})
    train(output, new_model, {"sft-bf16": {}}, bf16=True, by_engine=True)
    train(output, lora_model, {"lora": {}, "lora-only": {"exclude_frozen_parameters": True}})
