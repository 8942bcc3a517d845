"""Small transformers with random weights, and checkpoints of them in the format that DeepSpeed's ZeRO saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

Weights = dict[str, torch.Tensor]

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "in_channels": 4,
    "out_channels": 4,
    "text_embed_dim": 17,
    "time_embed_dim": 13,
    "max_text_seq_length": 5,
    "sample_height": 4,
    "sample_width": 4,
    "sample_frames": 9,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
}
BUFFER = "patch_embed.pos_embedding"


def random_model(seed: int = 0, **config: Any) -> CogVideoXTransformer3DModel:
    torch.manual_seed(seed)
    model = CogVideoXTransformer3DModel(**(CONFIG | config)).float()  # the learned positions are made in fp64
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def random_weights(seed: int = 0, **config: Any) -> Weights:
    return dict(random_model(seed, **config).state_dict())


def parted(flat: torch.Tensor, count: int, multiple: int) -> list[torch.Tensor]:
    """A flat tensor, padded with zeros to ``multiple``, cut into ``count`` equal parts."""
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % multiple))
    return list(padded.reshape(count, -1))


def write_zero(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    stage: int = 2,
    ranks: int = 2,
    frozen: Iterable[str] = (),
    with_frozen: bool = True,
    precision: str = "fp32",
    step: int = 7,
    alignment: int = 0,
) -> Path:
    """A checkpoint in DeepSpeed's format: two parameter groups, ``alignment`` spare values after a parameter."""
    frozen = {name for name in frozen if name != BUFFER}
    trained = [name for name in weights if name not in frozen and name != BUFFER]
    groups = [trained[::2], trained[1::2]]
    files = folder / "pytorch_model"
    files.mkdir(parents=True)
    low = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    shapes = [{name: weights[name].shape for name in group} for group in groups]
    config = {"bf16": {"enabled": precision == "bf16"}, "fp16": {"enabled": precision == "fp16"}}
    for rank in range(ranks):
        if rank and stage < 3:
            break
        placeholder = torch.empty(0, dtype=low)
        module = {name: value.to(low) if stage < 3 else placeholder for name, value in weights.items()}
        module = {name: value for name, value in module.items() if with_frozen or name not in frozen}
        module |= {BUFFER: weights[BUFFER].to(low)} if BUFFER in weights else {}
        fragments = {
            name: weights[name].to(low) if stage < 3 else parted(weights[name].to(low).flatten(), ranks, ranks)[rank]
            for name in frozen
        }
        saved = stage > 1 and with_frozen
        state: dict[str, Any] = {
            "module": module,
            "buffer_names": [BUFFER],
            "param_shapes": shapes,
            "frozen_param_shapes": {name: weights[name].shape for name in frozen} if saved else None,
            "frozen_param_fragments": fragments if saved else None,
            "shared_params": {},
            "ds_config": config,
            "ds_version": "0.19.8",
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        torch.save(state, files / f"{name}_model_states.pt")
    for rank in range(ranks):
        flats = []
        for group in groups:
            if stage == 3:
                shares = [parted(weights[name].flatten(), ranks, ranks)[rank] for name in group]
                flats.append(torch.cat(shares) if shares else torch.empty(0))
                continue
            spaced = [torch.nn.functional.pad(weights[name].flatten(), (0, alignment)) for name in group]
            whole = torch.cat(spaced)
            parts = parted(whole, ranks, 2 * ranks)
            padding = sum(part.numel() for part in parts) - whole.numel()
            flats.append(parts[rank][: parts[rank].numel() - padding] if rank == ranks - 1 else parts[rank])
        adam: dict[str, Any] = {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 1e-3}]}
        state = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks, ranks]}
        if stage == 3:
            state |= {"fp32_flat_groups": flats, "optimizer_state_dict": adam}
        else:
            state |= {"single_partition_of_fp32_groups": flats, "base_optimizer_state": adam}
            state["param_alignment_paddings"] = [[alignment] * len(group) for group in groups]
        prefix = "bf16_" if precision == "bf16" else ""
        path = files / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_config": config}, path)
    (folder / "latest").write_text("pytorch_model")
    return folder
