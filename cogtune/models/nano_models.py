"""The nano models: where they lie, and the parts that they are made of. Without torch, unless one has to be made."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogtune.models.download import made_once
from cogtune.models.random_configs import scheduler_config
from cogtune.models.variants import BuiltIn
from cogtune.system.digests import digest
from cogtune.system.errors import CogtuneError
from cogtune.system.json_files import read_json

NANO_PARTS = Path(__file__).parent / "nano_parts"
"""The trained parts that come with the package, and the ``records`` of how they were made."""

SHARED_PARTS = ("tokenizer", "text_encoder", "vae")
"""The parts that all nano models have in common."""

_WRITE_NANO = "cogtune.modeling.nano:write_nano"
"""Named rather than imported, since it needs torch and this package does without."""

_FORMAT = 1
"""Raise it when the files of a nano pipeline change for a reason that :func:`nano_model` cannot see."""


def transformer_part(name: str) -> str:
    """Return the folder of the transformer of variant ``name`` among the parts."""
    return f"transformer-{name}"


def nano_model(name: str) -> Path:
    """Return the nano pipeline of variant ``name`` in the user's cache folder, made at the first call.

    The cache folder is ``$COGTUNE_HOME``, or ``~/.cache/cogtune``. Several processes may ask at once. If the records
    of the parts change, another folder is made.

    Raises:
        UsageError: there is no such nano model.
        CogtuneError: the package lacks a part of it, or the cache folder cannot be written.
    """
    row = BuiltIn("nano", name).variant
    if not (NANO_PARTS / transformer_part(row.name)).is_dir():
        raise CogtuneError(
            f"nano:{row.name} is not part of this version: its transformer has yet to be trained",
            f"use a published model, or tiny:{row.name}, which has random weights",
        )
    hashes = [_recorded_hashes(part) for part in (*SHARED_PARTS, transformer_part(row.name))]
    settings = [scheduler_config(row, "tiny"), row.invert_scale_latents, row.image_to_video]
    version = digest([_FORMAT, hashes, settings])[:12]

    def write(folder: Path) -> None:
        write_nano: Callable[[str, Path, Path], Path] = pkgutil.resolve_name(_WRITE_NANO)
        write_nano(row.name, NANO_PARTS, folder)

    return made_once("nano", f"{row.name}-{version}", write)


def _recorded_hashes(part: str) -> dict[str, Any] | None:
    """Return the SHA-256 of each file of a part by its record; None for a part without one."""
    record = NANO_PARTS / "records" / f"{part}.json"
    hashes: dict[str, Any] | None = read_json(record)["files"] if record.is_file() else None
    return hashes
