"""``cogtune train --resume user/name``: a run's settings and checkpoint from the Hub, for this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogtune.commands.train import refuse_init_lora
from cogtune.config.resolving import Resolved, resolve, yaml_text
from cogtune.config.run_config import RunConfig, is_list_file, tagged
from cogtune.hub.public import public_settings
from cogtune.hub.resume import fetch_checkpoint, find_checkpoint, is_repository
from cogtune.run.checkpoints import checkpoints_after
from cogtune.run.folder import RUN_NAME
from cogtune.system import console
from cogtune.system.errors import UsageError
from cogtune.system.locks import exclusive_folder

__all__ = ["is_repository", "resume_from_hub"]

_OF_THIS_MACHINE = (
    "vram",
    "host_memory",
    "data",
    "output",
    "cache_dir",
    "quarantine",
    "validation_data",
    "validation_images",
    "init_lora",
    "allow_outside",
)
"""Settings that are never taken from the Hub, besides paths and addresses: what a run may read and where it writes is
this machine's own."""


def resume_from_hub(
    reference: str, *, preset_name: str | None, file: Path | None, flags: Mapping[str, Any], overwrite: bool
) -> tuple[Resolved, Path]:
    """Download the newest checkpoint of ``user/name[@revision]`` into the run's folder.

    Returns:
        The run's configuration, as for :func:`cogtune.commands.train.configure`, and the checkpoint's folder.

    Raises:
        UsageError: with every mistake; no --data; or the folder has later checkpoints, or another of that step.
        CogtuneError: the checkpoint cannot be downloaded or is not what was saved.
    """
    refuse_init_lora(flags)
    given = None
    if file is not None or preset_name is not None:
        given = resolve(preset_name=preset_name, file=file, flags=flags)
        flags = {key: getattr(given.config, key) for key, source in given.provenance.items() if source != "default"}
    if flags.get("data") is None:
        raise UsageError(
            f"--resume {reference} requires --data: the Hub has the checkpoint, not the dataset",
            "pass the folder of the dataset that the run was trained on",
        )
    if flags.get("machine_rank"):
        raise UsageError(
            "only machine 0 can resume from the Hub",
            "once it has downloaded the checkpoint, use --resume latest on the others; all must see the same --output",
        )
    output = Path(os.path.abspath(flags.get("output", "out")))  # noqa: PTH100 (links stay as they are)
    remote = find_checkpoint(reference)
    later = [path.name for path in checkpoints_after(output, remote.step)]
    if later and not overwrite:
        raise UsageError(
            f"{output} holds {', '.join(later)}, which a run from {remote.name} of {remote.repo_id} would replace",
            "use --resume latest to continue from the last one, --overwrite to delete them, or choose another --output",
        )
    with exclusive_folder(output):
        checkpoint, settings = fetch_checkpoint(remote, output, overwrite=overwrite)
    if given is not None:
        return given, checkpoint
    if not settings:
        raise UsageError(
            f"cannot resume: {remote.repo_id} has no {RUN_NAME}",
            "pass the --preset or --config that the run was started with",
        )
    return _with_settings(settings, f"--resume {reference}", flags), checkpoint


def _with_settings(settings: Mapping[str, Any], source: str, flags: Mapping[str, Any]) -> Resolved:
    """Resolve a run's settings from the Hub, with ``flags`` on top."""
    kept = {key: value for key, value in public_settings(settings).items() if key not in (*_OF_THIS_MACHINE, "preset")}
    if is_list_file(str(kept.get("validation_prompts") or "")):
        del kept["validation_prompts"]
    with tempfile.TemporaryDirectory(prefix="cogtune-resume-") as folder:
        file = Path(folder) / RUN_NAME
        file.write_text(yaml_text(kept), encoding="utf-8")
        resolved = resolve(file=file, flags=flags)
        provenance = {key: source if value == str(file) else value for key, value in resolved.provenance.items()}
    optional = ("data", "output", "cache_dir", "allow_outside", "vram", "host_memory", *tagged("network"))
    open_ = [key for key in RunConfig.model_fields if key not in (*kept, *flags, *optional)]
    if open_:
        flag_names = ", ".join(f"--{key.replace('_', '-')}" for key in open_)
        console.note(f"local paths of the first machine are not on the Hub; pass what the run needs: {flag_names}")
    return replace(resolved, provenance=provenance)
