"""An objective, batches for it, and a transformer that keeps what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cogtune.data.batches import Batch
from cogtune.modeling.encoders import VideoEncoder
from cogtune.models.checkpoint_configs import ModelSpec, read_spec
from cogtune.training.objective import Objective

CPU = torch.device("cpu")


class Fake(torch.nn.Module):
    """A transformer that keeps its input and answers with a fixed pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}

    def forward(self, **given: Any) -> tuple[torch.Tensor]:
        self.given = given
        return (torch.sin(given["hidden_states"][:, :, :16] * 3.0),)


def objective(folder: Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Objective:
    spec = read_spec(folder)
    return Objective(
        spec,
        folder,
        torch.full((226, 32), -1.0),
        seed=5,
        caption_dropout=dropout,
        device=CPU,
        dtype=dtype,
        image_encoder=VideoEncoder(folder, device=CPU, dtype=torch.float32) if spec.image_to_video else None,
    )


def batch_of(spec: ModelSpec, size: int = 2, *, first: int = 0, frames: int = 3) -> Batch:
    random = torch.Generator().manual_seed(9)
    moments = torch.randn(size, 32, frames, 8, 12, generator=random)
    moments[:, 16:] = -60.0  # no spread: the posterior's sample is its mean
    text = torch.randn(size, 226, 32, generator=random)
    image = (
        torch.randint(0, 256, (size, 3, 64, 96), dtype=torch.uint8, generator=random) if spec.image_to_video else None
    )
    return Batch(moments, text, image, tuple(map(str, range(size))), tuple(range(first, first + size)))
