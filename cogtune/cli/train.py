"""``cogtune train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cogtune import console
from cogtune.cli.options import ConfigFile, Fit, Flags, PresetName, with_config_flags
from cogtune.config import RunConfig
from cogtune.errors import UsageError


@with_config_flags(*RunConfig.model_fields)
def train(
    flags: Flags,
    preset: PresetName = None,
    config: ConfigFile = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", help="Go on from a checkpoint: latest, or a path. Its settings are kept."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where the output holds a run.")] = False,
    fit: Fit = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start even where the estimate says that the run does not fit this machine.")
    ] = False,
    slurm: Annotated[
        Path | None,
        typer.Option(
            "--slurm", help="Write a Slurm batch script of the run to this file, and stop.", show_default=False
        ),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Try the run first: one clip, three steps, a checkpoint and a sample video at the real size, in "
            "OUTPUT/smoke; says the pace, the peak of memory and the time of the run itself.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all, write the plan and the launch files, show them, and stop."),
    ] = False,
) -> None:
    """Fine-tune: check the data, encode what is missing, plan, and launch.

    Values come from the preset, then the file, then flags; OUTPUT/run.yaml keeps each with where it came from.
    """
    from cogtune import runs
    from cogtune.estimate import check_arrangement
    from cogtune.fit import fitted, refuse_unfit, this_machine
    from cogtune.launch_configs import check_machines
    from cogtune.modeling.locate import spec_of
    from cogtune.planning import outlook

    resolved = runs.configure(preset_name=preset, file=config, flags=flags, resume=resume)
    spec, machine = spec_of(resolved.config.model), this_machine()
    if resume is None and resolved.config.init_lora is not None:
        from cogtune.modeling.lora_files import with_init_lora

        resolved = with_init_lora(resolved, spec, console.warn)
    if fit:
        resolved = fitted(resolved, spec, machine)
    if slurm is not None:
        if smoke or dry_run:
            raise UsageError(
                "--slurm goes with neither --smoke nor --dry-run", "it writes the script of the run itself"
            )
        from cogtune.plan import check
        from cogtune.slurm import write_job

        check(resolved.config, spec)
        more = [word for word, wanted in (("--overwrite", overwrite), ("--force", force)) if wanted]
        if resume is not None:
            more += ["--resume", resume if resume == "latest" else str(Path(resume).absolute())]
        settings = write_job(slurm, resolved, flags=more)
        command = shlex.join(["sbatch", str(slurm)])
        console.say(f"written to {slurm}, with its configuration in {settings}; start it with: {command}")
        return
    check_machines(resolved.config)
    check_arrangement(resolved.config, spec, machine.cards[0].name if machine.cards else "")
    if not force and not dry_run:
        refuse_unfit(resolved.config, spec, machine, preset)
    if smoke:
        if resume is not None or dry_run:
            raise UsageError("--smoke goes with neither --resume nor --dry-run", "it leaves the run itself alone")
        from cogtune.smoke import smoke as smoke_test

        for line in smoke_test(resolved).lines():
            console.say(line)
        return
    if dry_run:
        ready = runs.get_ready(resolved, resume=resume, overwrite=overwrite, dry_run=True)
        console.table("", ("key", "value", "from"), runs.describe(ready.plan))
        counts = tuple(ready.plan.buckets.values())
        found = outlook(ready.plan.config, spec, machine, counts, ready.files.folder)
        console.table("", ("what", "how much"), found.rows())
        if ready.left:
            words = ["cogtune", "dataset", "cache", str(ready.plan.config.data), "--config", str(ready.files.run_yaml)]
            console.say(f"to encode first: {ready.left}, with: {shlex.join(words)}")
        console.say(f"written to {ready.files.folder}; by hand: {shlex.join(['sh', str(ready.files.script)])}")
        return
    for line in runs.train(resolved, resume=resume, overwrite=overwrite):
        console.say(line)
