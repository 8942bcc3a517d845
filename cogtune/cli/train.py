"""``cogtune train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogtune.cli.options import ClipDecoder, ConfigFile, Fit, Flags, PresetName, use_decoder, with_config_flags
from cogtune.config.run_config import RunConfig
from cogtune.system import console
from cogtune.system.errors import UsageError

if TYPE_CHECKING:
    from cogtune.commands.train import PreparedRun
    from cogtune.config.resolving import Resolved
    from cogtune.models.checkpoint_configs import ModelSpec
    from cogtune.planning.fit import Hardware

_FIRST = ("model", "data", "output", "type", "size", "steps", "learning_rate", "rank", "validation_prompts")
"""The options that most runs set, shown first; the others are grouped in panels."""

_START = "Starting the run"


@with_config_flags(*RunConfig.model_fields, first=_FIRST)
def train(
    flags: Flags,
    preset: PresetName = None,
    config: ConfigFile = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            help="Resume from a checkpoint: latest, a path, or user/name[@revision] on the Hub, where `cogtune push "
            "--every` put it. The run's settings are kept.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=_START, help="Start over if --output already holds a run.")
    ] = False,
    fit: Fit = False,
    decoder: ClipDecoder = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            rich_help_panel=_START,
            help="Start even if the run is estimated not to fit this machine.",
        ),
    ] = False,
    slurm: Annotated[
        Path | None,
        typer.Option(
            "--slurm",
            rich_help_panel=_START,
            help="Write a Slurm batch script for the run to this file, then exit.",
            show_default=False,
        ),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            rich_help_panel=_START,
            help="Try the run first: one clip, three steps, a checkpoint and a sample video at the real size, in "
            "OUTPUT/smoke. Reports time per step, peak memory and the estimated time of the full run.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, write and show the plan and launch files, then exit."),
    ] = False,
) -> None:
    """Fine-tune a model: check the data, encode what is missing, plan, and launch.

    Settings come from the preset, the --config file and flags, in that order. OUTPUT/run.yaml records their sources.
    """
    from cogtune.commands import train as runs
    from cogtune.commands.resume import is_repository, resume_from_hub
    from cogtune.config.launchers import check_machines
    from cogtune.models.locate import spec_of
    from cogtune.planning.estimate import check_arrangement
    from cogtune.planning.fit import fitted, local_hardware, refuse_unfit
    from cogtune.planning.free_memory import with_free_memory
    from cogtune.planning.host_memory import with_state
    from cogtune.run.lora_paths import find_lora

    use_decoder(decoder)
    if smoke and (resume is not None or dry_run):
        raise UsageError("--smoke cannot be used with --resume or --dry-run", "remove one of them")
    if resume is not None and is_repository(resume):
        resolved, checkpoint = resume_from_hub(
            resume, preset_name=preset, file=config, flags=flags, overwrite=overwrite
        )
        resume = str(checkpoint)
    else:
        resolved = runs.configure(preset_name=preset, file=config, flags=flags, resume=resume)
    spec, machine = spec_of(resolved.config.model), local_hardware()
    if resume is None and resolved.config.init_lora is not None:
        find_lora(resolved.config.init_lora)  # before torch is imported
        from cogtune.modeling.lora_files import with_init_lora

        resolved = with_init_lora(resolved, spec, console.warn)
    if fit:
        resolved = fitted(resolved, spec, machine)
    if slurm is not None:
        if smoke or dry_run:
            raise UsageError("--slurm cannot be used with --smoke or --dry-run", "remove one of them")
        more = [word for word, wanted in (("--overwrite", overwrite), ("--force", force)) if wanted]
        if decoder is not None:
            more += ["--decoder", decoder]
        if resume is not None:
            more += ["--resume", resume if resume == "latest" else str(Path(resume).absolute())]
        _write_slurm(slurm, resolved, spec, more)
        return
    check_machines(resolved.config)
    resolved = with_free_memory(resolved, spec, machine)
    if resume is None:
        resolved = with_state(resolved, spec)
    check_arrangement(resolved.config, spec, machine.cards[0].name if machine.cards else "")
    if not force and not dry_run:
        refuse_unfit(resolved.config, spec, machine, preset)
    if smoke:
        from cogtune.commands.smoke import smoke as smoke_test

        for line in smoke_test(resolved).lines():
            console.say(line)
        return
    if dry_run:
        ready = runs.prepare_run(resolved, resume=resume, overwrite=overwrite, dry_run=True)
        _show_dry_run(ready, spec, machine)
        return
    for line in runs.train(resolved, resume=resume, overwrite=overwrite):
        console.say(line)


def _write_slurm(script: Path, resolved: Resolved, spec: ModelSpec, flags: list[str]) -> None:
    from cogtune.commands.slurm import write_job
    from cogtune.run.plan import check_config

    check_config(resolved.config, spec)
    settings = write_job(script, resolved, flags=flags)
    command = shlex.join(["sbatch", str(script)])
    console.say(f"wrote {script} and its configuration {settings}; submit it with: {command}")


def _show_dry_run(ready: PreparedRun, spec: ModelSpec, machine: Hardware) -> None:
    from cogtune.commands.run_summary import describe
    from cogtune.planning.summary import estimate_run

    console.table("", ("key", "value", "from"), describe(ready.plan))
    counts = tuple(ready.plan.buckets.values())
    found = estimate_run(ready.plan.config, spec, machine, counts, ready.files.folder)
    console.table("", ("what", "how much"), found.rows())
    if ready.left:
        words = ["cogtune", "dataset", "cache", str(ready.plan.config.data), "--config", str(ready.files.run_yaml)]
        console.say(f"still to encode: {ready.left}; run: {shlex.join(words)}")
    console.say(
        f"wrote launch files to {ready.files.folder}; run them with: {shlex.join(['sh', str(ready.files.script)])}"
    )
