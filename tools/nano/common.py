"""What the scripts of nano share: progress lines, deadlines, states to resume from, and the record."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

_BEGAN = time.monotonic()


def say(text: str) -> None:
    """A line of progress, at once, with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", flush=True)


class Deadline:
    """When to stop: so many seconds after the script's start, whatever it imported and compiled meanwhile."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - _BEGAN)

    def __bool__(self) -> bool:
        return self.left <= 0


def best_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state under its final name only when all of it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    torch.save(state, aside)
    aside.replace(path)


def load_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in ``folder``, by its path in it."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def machine(device: torch.device) -> dict[str, str]:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": card, "torch": torch.__version__, "python": platform.python_version()}


def note(parts: Path, part: str, facts: dict[str, Any]) -> None:
    """Write ``facts`` about ``part`` to ``records/PART.json`` beside the parts, with the hashes of its files."""
    path = parts / "records" / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"files": folder_hashes(parts / part)}, indent=1, sort_keys=True) + "\n")


def recorded(parts: Path) -> dict[str, dict[str, Any]]:
    """Return what :func:`note` wrote, by part."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((parts / "records").glob("*.json"))}
