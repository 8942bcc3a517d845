"""The machine and software of a run: GPUs, system, and relevant versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from typing import Any

import psutil

from cogtune import __version__
from cogtune.system.gpus import gpus

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "deepspeed")
"""The libraries whose versions affect the result of a training step."""


def versions() -> dict[str, str]:
    """Return the versions of cogtune, Python and the installed :data:`PACKAGES`, by name."""
    found = {"cogtune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """Return the machine and its versions as JSON-serializable values, without anything that identifies it."""
    return {
        "gpus": [{"name": card.name, "memory_gib": round(card.total / 2**30, 1)} for card in gpus()],
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
