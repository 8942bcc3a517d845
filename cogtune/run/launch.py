"""Writing a plan's launch files and running ``accelerate launch``; exit codes and signals are passed on.

Files of ``OUT/launch``: ``plan.json``, ``accelerate.yaml``, ``deepspeed.json``, ``command.sh``, and for each process
of a run ``rank-N.json``, in which it says how it is and how it ended.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from cogtune.config.launchers import (
    accelerate_config,
    deepspeed_config,
    rendezvous,
    rendezvous_port,
    rendezvous_timeout,
)
from cogtune.config.run_config import RunConfig
from cogtune.run.checkpoints import checkpoints, stamp
from cogtune.run.folder import RUN_NAME, RunFolder
from cogtune.run.plan import Plan
from cogtune.system import console, names, processes
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained, write_text
from cogtune.system.folders import remove_leftovers
from cogtune.system.json_files import write_json, write_sealed
from cogtune.system.processes import WorkerReport
from cogtune.system.safe_path import STANDARD_LIBRARY

ENVIRONMENT = {
    "MKL_CBWR": "AUTO,STRICT",  # else some CPUs round otherwise where a tensor lies elsewhere in memory
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_COMPILE_THREADS": "4",  # else a process a core, and each of a run's ranks has its own
}
"""Defaults for the worker processes' environment."""


def exported() -> str:
    """Return the lines of a shell script that set :data:`ENVIRONMENT`, each variable where it is not set."""
    return "\n".join(f'export {name}="${{{name}:-{value}}}"' for name, value in ENVIRONMENT.items())


_WORKER = "cogtune.training.worker"

LAUNCHER = (sys.executable, "-m", "cogtune.training.launcher")
"""Replaces ``accelerate launch`` in the command that cogtune starts."""


@dataclass(frozen=True)
class LaunchFiles:
    """The folder of a run's launch files."""

    folder: Path

    @property
    def plan(self) -> Path:
        """What the processes read."""
        return self.folder / names.PLAN

    @property
    def accelerate(self) -> Path:
        """What ``accelerate launch`` reads."""
        return self.folder / "accelerate.yaml"

    @property
    def deepspeed(self) -> Path:
        """What DeepSpeed reads; absent for DDP."""
        return self.folder / "deepspeed.json"

    @property
    def script(self) -> Path:
        """The same launch, to run by hand."""
        return self.folder / "command.sh"

    @property
    def log(self) -> Path:
        """The output of the launcher and the libraries."""
        return RunFolder(self.folder.parent).logs / f"{self.folder.name}.log"

    @property
    def run_yaml(self) -> Path:
        """The configuration; the worker puts it at the top of the run's folder once the run is sure to start."""
        return self.folder / RUN_NAME

    def report(self, rank: int) -> WorkerReport:
        """Return where process ``rank`` says how it is."""
        return WorkerReport(self.folder / f"rank-{rank}.json")

    def command(self, config: RunConfig, *worker: str) -> list[str]:
        """Return the ``accelerate launch`` command, for each machine of the run.

        Args:
            worker: the module that each process runs, and words put behind the plan; the run's own when left out.
        """
        module, *words = worker or (_WORKER,)
        launch = [
            "accelerate",
            "launch",
            "--config_file",
            str(self.accelerate),
            "--main_process_port",
            str(rendezvous_port(config)),
            "--quiet",
        ]
        if config.num_machines > 1:  # how long the launchers wait for each other; accelerate.yaml has no key for it
            launch += ["--rdzv_conf", f"timeout={max(1, round(60 * config.nccl_timeout))}"]
        return [*launch, "--module", module, str(self.plan), *words]


def write_files(plan: Plan, run_yaml: str, folder: str = names.LAUNCH) -> LaunchFiles:
    """Write a run's launch files.

    Args:
        run_yaml: the resolved configuration, with where each value came from.
        folder: name of the folder in the run's output.

    Raises:
        CogtuneError: the output folder cannot be written.
    """
    config = plan.config
    files = LaunchFiles(config.output / folder)
    with os_errors_explained(files.folder):
        files.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(files.folder)
    deepspeed = deepspeed_config(config)
    if deepspeed is None:
        files.deepspeed.unlink(missing_ok=True)
    else:
        write_json(files.deepspeed, deepspeed)
    write_sealed(files.plan, plan.to_dict())
    write_accelerate(files, config)
    write_text(files.script, _script(files, config))
    files.script.chmod(0o755)
    write_text(files.run_yaml, run_yaml)
    return files


def write_accelerate(files: LaunchFiles, config: RunConfig) -> None:
    """Write the file that ``accelerate launch`` reads."""
    write_text(files.accelerate, yaml.safe_dump(accelerate_config(config, files.deepspeed)))


def _script(files: LaunchFiles, config: RunConfig) -> str:
    exports = f"{exported()}\n"
    exports += f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"\n'
    exports += "# The processes start in this folder, so that they import nothing from the one you are in.\n"
    exports += f"export PYTHONSAFEPATH=1\ncd {shlex.quote(STANDARD_LIBRARY)}\n"
    return (
        "#!/bin/sh\n"
        "# Starts this run by hand, as `cogtune train` does. You may edit plan.json and the configs next to it.\n"
        f"{exports}exec {shlex.join(files.command(config))}\n"
    )


def start(plan: Plan, files: LaunchFiles, *worker: str, if_stopped: str | None = None, is_last: bool = True) -> None:
    """Run the plan with ``accelerate launch`` and wait for it to finish.

    Args:
        worker: as for :meth:`LaunchFiles.command`.
        if_stopped: hint for a stopped run, instead of how to continue it.
        is_last: as for :func:`cogtune.system.processes.supervise`.

    Raises:
        CogtuneError: the run failed or was stopped.
    """
    config = plan.config
    first = config.machine_rank * config.local_processes
    if config.num_machines > 1:
        others = config.num_machines - 1
        console.note(
            f"waiting for {others} other {'machine' if others == 1 else 'machines'} at {rendezvous(config)}, "
            f"at most {config.nccl_timeout:g} minutes"
        )
    processes.supervise(
        [*LAUNCHER, *files.command(config, *worker)[2:]],
        [files.report(first + rank) for rank in range(config.local_processes)],
        files.log,
        environment=ENVIRONMENT,
        if_stopped=lambda: if_stopped or how_to_go_on(plan),
        if_unheard=lambda log: _not_met(config, log),
        is_last=is_last,
    )


def _not_met(config: RunConfig, log: str) -> CogtuneError | None:
    """Explain why the launchers of several machines did not connect, from torch's and accelerate's output."""
    if config.num_machines == 1:
        return None
    if "another process is utilizing it" in log:
        return CogtuneError(
            f"port {rendezvous_port(config)} is already in use on this machine",
            "choose another --main-process-port, the same on each machine",
        )
    if "DistStoreError" in log or "DistNetworkError" in log:
        return rendezvous_timeout(config)
    return None


def checkpoints_of(plan: Plan) -> list[Path]:
    """Return the run's own whole checkpoints, oldest first; not those of another run that it is about to overwrite."""
    found = checkpoints(plan.config.output)
    return [path for path in found if plan.replaces.get(path.name) != stamp(path)]


def how_to_go_on(plan: Plan) -> str:
    """Return the hint for a run that ended before its last step."""
    if not checkpoints_of(plan):
        return "no checkpoint has been written yet; run the same command again to start over"
    return f"continue with: cogtune train --resume latest --output {shlex.quote(str(plan.config.output))}"
