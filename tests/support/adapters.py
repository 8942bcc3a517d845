"""Models with adapters that have moved from their start, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from cogtune.modeling.adapters import add_lora


def adapted(folder: Path, *, dtype: torch.dtype = torch.float32, **kind: Any) -> CogVideoXTransformer3DModel:
    """A model with an adapter whose every weight has moved from its start."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype)
    add_lora(transformer, rank=4, alpha=3, target_modules=["to_q", "to_out.0"], seed=1, **kind)
    random = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    return transformer


def answer(transformer: CogVideoXTransformer3DModel) -> torch.Tensor:
    """The model's output for a fixed input."""
    random = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 3, 16, 8, 12, generator=random)
    text = torch.randn(1, 226, 32, generator=random)
    with torch.no_grad():
        output: torch.Tensor = transformer(latents, text, torch.tensor([500]), return_dict=False)[0]
    return output
