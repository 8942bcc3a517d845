"""What a checkpoint holds, and how two of them differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def differing(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two nested values are not the same to the bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        return [place for key in one for place in differing(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        return [
            place for n, pair in enumerate(zip(one, other, strict=True)) for place in differing(*pair, f"{where}/{n}")
        ]
    return [] if one == other or type(one).__module__.startswith("deepspeed") else [where]


def held(checkpoint: Path) -> dict[str, Any]:
    """Every tensor and number in a checkpoint: weights, optimizer, shards."""
    files = [*checkpoint.rglob("*.safetensors"), *checkpoint.rglob("*.pt")]
    return {
        str(file.relative_to(checkpoint)): load_file(file)
        if file.suffix == ".safetensors"
        else torch.load(file, weights_only=False)
        for file in files
    }


def assert_whole(output: Path) -> None:
    """Everything under a final name can be read to its end, and is there in every checkpoint."""
    files = []
    for checkpoint in output.glob("checkpoint-*"):
        files.append(set(held(checkpoint)))
        assert files[-1] == files[0] != set()
        assert f"checkpoint-{json.loads((checkpoint / 'state.json').read_text())['step']}" == checkpoint.name
