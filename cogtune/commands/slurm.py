"""A Slurm batch script for a run, on one machine or several."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cogtune.config.launchers import rendezvous_port
from cogtune.config.resolving import Resolved
from cogtune.config.run_config import RunConfig
from cogtune.data.sources import is_on_hub
from cogtune.run.folder import RunFolder
from cogtune.run.launch import exported
from cogtune.system.errors import UsageError
from cogtune.system.files import os_errors_explained, write_text

STOP_BEFORE = 300
"""Seconds before its time limit at which a job is asked to stop, so that it can write a checkpoint."""


def write_job(path: Path, resolved: Resolved, *, flags: Sequence[str] = ()) -> Path:
    """Write the script to ``path`` and the run's configuration next to it; return the configuration's path.

    The script encodes the dataset on the first machine, then starts ``cogtune train`` on each.

    Args:
        flags: more arguments for ``cogtune train``, such as ``--overwrite``.

    Raises:
        UsageError: the dataset does not exist, or one of the two files exists with other content.
        CogtuneError: they cannot be written.
    """
    before = resolved.config
    config = before.with_absolute_paths()
    if not before.data.is_dir():  # one on the Hub: its name is no path
        config = config.model_copy(update={"data": before.data, "cache_dir": before.cache_dir})
        if not is_on_hub(str(before.data)):
            raise UsageError(f"no such folder: {before.data}", "pass the dataset's folder, or user/name on the Hub")
    settings = path.absolute().with_name(f"{path.name}.yaml")
    texts = {settings: replace(resolved, config=config).to_yaml(), path: _script(config, settings, flags)}
    for file, text in texts.items():
        if file.exists() and (file.is_dir() or file.read_bytes() != text.encode()):
            raise UsageError(
                f"{file} already exists and may contain your own changes",
                "write to another file with --slurm, or delete this one",
            )
    with os_errors_explained(config.output):
        RunFolder(config.output).logs.mkdir(parents=True, exist_ok=True)  # Slurm does not make it
    for file, text in texts.items():
        write_text(file, text)
    path.chmod(0o755)
    return settings


def _script(config: RunConfig, settings: Path, flags: Sequence[str]) -> str:
    log = str(RunFolder(config.output).logs).replace("%", "%%") + "/slurm-%j.log"
    log = f'"{log}"' if re.search(r"[\s']", log) else log  # Slurm takes quotes off
    here = shlex.quote(str(settings))
    script = Path(sys.executable).with_name("cogtune")  # `python -m` would import from the folder the job starts in
    program = shlex.join([str(script)] if script.is_file() else [sys.executable, "-m", "cogtune"])
    data = shlex.quote(str(config.data))
    train = f"{program} train --config {here}{''.join(f' {shlex.quote(word)}' for word in flags)}"
    if config.num_machines > 1:
        train += (
            f' --machine-rank "$SLURM_NODEID" --main-process-ip "$MAIN" --main-process-port {rendezvous_port(config)}'
        )
    return f"""#!/bin/bash
#SBATCH --job-name=cogtune
#SBATCH --nodes={config.num_machines}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={config.local_processes}
#SBATCH --cpus-per-task={4 * config.local_processes}
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@{STOP_BEFORE}
#SBATCH --output={log}
# Add what your cluster asks for: --partition, --account, --mem.
set -euo pipefail
{exported()}
export PYTHONSAFEPATH=1
export MAIN="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
srun --nodes=1 --ntasks=1 --nodelist="$MAIN" {program} dataset cache {data} --config {here}
srun --kill-on-bad-exit=1 bash -c {shlex.quote(train)}
"""
