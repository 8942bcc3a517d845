"""Finding the LoRA file that a path or a Hub id means. Needs no torch."""

from __future__ import annotations

import math
from pathlib import Path

from cogtune.models.download import snapshot
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import checkpoints, refuse_shards
from cogtune.system.errors import UsageError

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's settings in an adapter folder."""

OF_ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors", "README.md")
"""The files of a folder that PEFT writes."""

FILE_NAMES = (LORA_WEIGHTS_NAME, "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
"""The file names of diffusers and PEFT for a LoRA in a folder, in order of preference."""

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of LoRA files."""


def file_and_weight(text: str) -> tuple[str, float]:
    """Split ``LORA:WEIGHT`` into what is before the last colon and the weight, 1 without one.

    Raises:
        UsageError: what follows the last colon is no finite number, and no file has such a name.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number if name else "")
    except ValueError:
        raise UsageError(
            f"no such LoRA: '{text}'", "write FILE or FILE:WEIGHT, such as style.safetensors:0.8"
        ) from None
    if not math.isfinite(weight):
        raise UsageError(f"LoRA {text}: {weight} is not a finite number", "write a weight such as 0.8")
    return name, weight


_OF_TRAINING = ("optimizer", "scheduler", "sampler", "random_states", "scaler")
"""How the names of accelerate's files without weights begin."""


def _weights_in(folder: Path) -> list[Path]:
    """Return the files of a folder that may be a LoRA, by their names."""
    files = (path for path in folder.glob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.startswith(_OF_TRAINING))


def _file_in(folder: Path) -> Path | None:
    """Return the LoRA file directly in ``folder``: by diffusers' or PEFT's name, or the only one that may be it."""
    for name in FILE_NAMES:
        if (folder / name).is_file():
            return folder / name
    others = _weights_in(folder)
    return others[0] if len(others) == 1 and others[0].suffix == ".safetensors" else None


def find_lora(path: Path) -> Path:
    """Return the LoRA file that ``path`` means: itself, or the one in a run, a checkpoint or an adapter's folder.

    Raises:
        UsageError: there is none.
    """
    if path.is_file():
        return path
    for folder in (path, *reversed(checkpoints(path))):
        if (found := _file_in(folder)) is not None:
            return found
    refuse_shards(path)
    if not path.exists():
        raise UsageError(
            f"no such file or folder: {path}",
            "pass a run folder, a checkpoint, a LoRA file, or the id of a LoRA on the Hub (user/name)",
        )
    if (path / "model_index.json").is_file():
        raise UsageError(f"{path} is a complete model, not a LoRA", "pass it as --model")
    below = [file for name in FILE_NAMES for file in path.glob(f"*/{name}")]
    candidates = _weights_in(path) or sorted(below)
    raise UsageError(
        f"{path} contains no checkpoint, and it is unclear which LoRA file to use",
        "pass one of these files" if candidates else "pass a run folder, a checkpoint or a LoRA file",
        details=[str(file) for file in candidates],
    )


def is_on_hub(reference: str) -> bool:
    """Return whether a reference can only mean a LoRA on the Hub, ``user/name[/FILE]``."""
    parts = reference.split("/")
    is_id = len(parts) > 1 and all(parts[:2]) and not parts[1].endswith(SUFFIXES)
    return is_id and not reference.startswith((".", "/", "~")) and not Path(parts[0]).exists()


def lora_at(reference: str) -> Path:
    """Return the LoRA file that ``reference`` means: as :func:`find_lora`, or ``user/name[/FILE]`` on the Hub.

    Raises:
        UsageError: there is none.
        CogtuneError: the download failed.
    """
    path, parts = Path(reference).expanduser(), reference.split("/")
    if not is_on_hub(reference):
        return find_lora(path)
    repo_id, name = "/".join(parts[:2]), "/".join(parts[2:])
    folder = snapshot(
        repo_id,
        "model",
        patterns=[name] if name else [*FILE_NAMES, ADAPTER_CONFIG],
        otherwise=f"check the network, and the path if you meant a file: {path} does not exist",
    )
    if name and not (folder / name).is_file():
        raise UsageError(f"the model {repo_id} on the Hub has no file {name}", "check the spelling")
    if not name and not any((folder / usual).is_file() for usual in FILE_NAMES):
        raise UsageError(
            f"the model {repo_id} on the Hub has no LoRA by one of the names {', '.join(FILE_NAMES)}",
            f"pass the file too: {repo_id}/FILE.safetensors",
        )
    return find_lora(folder / name if name else folder)
