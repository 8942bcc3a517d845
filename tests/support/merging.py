"""Sharded checkpoints made by the bare libraries, and how what is merged of them is compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from tests.support.forked_workers import run_script
from tests.support.zero_checkpoints import Weights


def loaded(folder: Path) -> Weights:
    model, info = CogVideoXTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return {name: value.float() for name, value in model.state_dict().items()}


def assert_same(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different


def rank_file(checkpoint: Path, rank: int, kind: str = "optim") -> Path:
    return checkpoint / "pytorch_model" / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (eval, (f"__import__('pathlib').Path({str(self.path)!r}).touch()",))


def train_with_deepspeed(folder: Path, stage: int) -> None:
    """Run the bare training program with two processes."""
    deepspeed = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    run_script("zero_script", folder, deepspeed=folder / "deepspeed.json")
