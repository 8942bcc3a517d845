"""What a run is made on and with: GPUs, system, versions of what matters."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from typing import Any

import psutil

from cogtune import __version__
from cogtune.system.gpus import gpus

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "deepspeed")
"""The libraries whose versions decide what a training step computes."""


def versions() -> dict[str, str]:
    """Return versions of cogtune, Python and those of :data:`PACKAGES` that are installed, by name."""
    found = {"cogtune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """Return this machine and its versions as JSON-able values; nothing that tells whose it is."""
    return {
        "gpus": [{"name": card.name, "memory_gib": round(card.total / 2**30, 1)} for card in gpus()],
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
