"""The configuration that a run was started with, as its folder keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogtune.config.resolving import MOST_YAML, Resolved, read_mapping, resolve, sources_in
from cogtune.config.run_config import RunConfig
from cogtune.run.checkpoints import STATE_NAME
from cogtune.run.folder import RunFolder
from cogtune.system.errors import CogtuneError
from cogtune.system.files import read_bytes


def read_run(folder: Path, flags: Mapping[str, Any] | None = None) -> Resolved:
    """Read the configuration of the run in ``folder``, with that folder as its ``output``.

    Args:
        flags: values to change, as for :func:`resolve`; all others keep the source that ``run.yaml`` says.

    Raises:
        UsageError: as for :func:`resolve`.
        CogtuneError: the folder contains no run, or its file is truncated: defaults would replace the rest.
    """
    file, flags = RunFolder(folder).run_yaml, flags or {}
    if not file.is_file():
        raise CogtuneError(
            f"{folder} is not a run folder: run.yaml is missing", "pass the --output folder of a training run"
        )
    text = read_bytes(file, MOST_YAML).decode("utf-8-sig", errors="replace")
    recorded = read_mapping(file)
    lacking = [key for key in RunConfig.model_fields if key not in recorded]
    if lacking or not text.endswith("\n"):
        what = f"{', '.join(lacking)} missing" if lacking else "its last line is incomplete"
        raise CogtuneError(
            f"{file} is truncated, or was written by another version: {what}",
            f"restore it from 'config' in a checkpoint's {STATE_NAME}",
        )
    resolved = resolve(file=file, flags={"output": folder, **flags})
    provenance = dict(resolved.provenance)
    for key, source in sources_in(text).items():
        if provenance[key] == str(file) or (key == "output" and key not in flags):
            provenance[key] = source
    return replace(resolved, provenance=provenance)
