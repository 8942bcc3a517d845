"""What ``cogtune train`` does, from a configuration to a finished run: look, encode, plan, launch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogtune import caching, console, launch
from cogtune.checkpoints import check_fits, checkpoints, choose, read_state
from cogtune.config import Resolved, RunConfig, resolve
from cogtune.data.cache import Index, caption_of
from cogtune.data.checks import Report, check_dataset
from cogtune.data.frames import FrameSettings
from cogtune.data.sources import Dataset, Reading, locate_dataset, read_dataset
from cogtune.errors import CogtuneError, UsageError
from cogtune.files import explained, remove_folder, remove_partials
from cogtune.geometry import Size
from cogtune.launch import LaunchFiles
from cogtune.modeling.locate import locate
from cogtune.models import LORA_WEIGHTS_NAME, TINY, ModelSpec, fingerprint, published, read_spec
from cogtune.plan import Plan, check, identity_of, make_plan
from cogtune.process import alone_in


@dataclass(frozen=True)
class Ready:
    """A run that only has to be launched."""

    plan: Plan
    files: LaunchFiles
    left: str
    """What a dry run left to encode, in words; empty when all is cached."""


def configure(*, preset_name: str | None, file: Path | None, flags: Mapping[str, Any], resume: str | None) -> Resolved:
    """The configuration of a run; a resumed one starts from its own ``run.yaml`` unless told otherwise.

    Raises:
        UsageError: with every mistake.
    """
    if resume is not None and file is None and preset_name is None:
        output = Path(flags.get("output", "out")) if resume == "latest" else Path(resume).absolute().parent
        if (output / "run.yaml").is_file():
            return resolve(file=output / "run.yaml", flags={**flags, "output": output})
    return resolve(preset_name=preset_name, file=file, flags=flags)


def validate(config: RunConfig) -> Report:
    """Look for everything that is wrong with a dataset; a published model need not be on this machine.

    Raises:
        CogtuneError: there is no dataset, or no such model.
    """
    config = _with_data_here(config)
    row = published(config.model)
    if row is not None and (config.size is not None or not config.model.startswith(TINY)):
        size = Size.parse(config.size) if config.size else row.native
        settings = FrameSettings(size=size, fps=config.fps or float(row.fps), start=config.skip_start)
        return check_dataset(_read(config), settings)
    spec = read_spec(locate(config.model, weights=False))
    return check_dataset(_read(config), caching.frame_settings(config, spec), spec)


def cache(config: RunConfig) -> str:
    """Encode what is missing of a dataset; what was done, in words.

    Raises:
        CogtuneError: something in the dataset stands in the way, or encoding failed.
    """
    config = _with_data_here(config).anchored()
    checkpoint = locate(config.model)
    spec = read_spec(checkpoint)
    check(config, spec)
    dataset = checked_dataset(config, spec)
    prepared = caching.prepare(config, spec, checkpoint, dataset)
    everything = f"{len(dataset.samples)} samples in {prepared.store.root}"
    if not prepared.todo:
        return f"nothing to do: {everything}"
    caching.fill(caching.job_for(prepared, config, spec, checkpoint))
    return f"encoded {prepared.todo}: {everything}"


def get_ready(resolved: Resolved, *, resume: str | None, overwrite: bool, dry_run: bool) -> Ready:
    """Check everything, encode what is missing, and write the run's files.

    Args:
        resume: ``latest`` or a checkpoint's path, to go on from it.
        overwrite: delete the run that is in the output folder.
        dry_run: download, encode and delete nothing; only look, and write the files.

    Raises:
        CogtuneError: with everything that stands in the way.
    """
    config = _with_data_here(resolved.config, download=not dry_run).anchored()
    resolved = replace(resolved, config=config)
    if config.output.is_dir():
        with alone_in(config.output):  # a run at work there is told before anything else; the worker holds it later
            pass
    start_from = choose(resume, config.output) if resume else None
    if start_from is None:
        _make_room(config.output, overwrite=overwrite, dry_run=dry_run)
    checkpoint = locate(config.model, weights=not dry_run)
    spec = read_spec(checkpoint)
    check(config, spec)
    dataset = checked_dataset(config, spec)
    if any((checkpoint / "transformer").glob("*.safetensors")):
        index, left = _cached(config, spec, checkpoint, dataset, dry_run=dry_run)
        identity = identity_of(config, base=fingerprint(checkpoint, "transformer"), data=index.digest)
    else:  # a dry run with a model that is not on this machine
        index, left, identity = Index((), ""), f"everything, after downloading {config.model}", {}
    if start_from is not None:
        check_fits(start_from, read_state(start_from), identity)
    plan = make_plan(
        resolved,
        checkpoint=checkpoint,
        spec=spec,
        samples=len(dataset.samples),
        prompt=caption_of(dataset.samples[0], config.id_token),
        index=config.output / "launch" / "index.json",
        identity=identity,
        resume=start_from,
    )
    files = launch.write_files(plan, resolved.to_yaml())
    index.write(plan.index)
    return Ready(plan, files, left)


def _with_data_here(config: RunConfig, *, download: bool = True) -> RunConfig:
    """The same with a folder on this machine for its dataset, which may be one on the Hub."""
    return config.model_copy(update={"data": locate_dataset(str(config.data), download=download)})


def _read(config: RunConfig) -> Dataset:
    return read_dataset(
        config.data,
        Reading(
            format=config.format,
            caption_column=config.caption_column,
            video_column=config.video_column,
            image_column=config.image_column,
            allow_outside=config.allow_outside,
        ),
    )


def checked_dataset(config: RunConfig, spec: ModelSpec) -> Dataset:
    """The dataset, when nothing in it stands in the way of training.

    Raises:
        CogtuneError: with every error found.
    """
    dataset = _read(config)
    report = check_dataset(dataset, caching.frame_settings(config, spec), spec)
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if errors:
        raise CogtuneError(
            f"{config.data} cannot be trained on as it is",
            f"`cogtune dataset validate {config.data}` explains each",
            details=[f"{finding.where}: {finding.message}" for finding in errors],
        )
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    if warnings:
        console.note(f"{warnings} warnings about the dataset: `cogtune dataset validate {config.data}` shows them")
    return dataset


def _cached(
    config: RunConfig, spec: ModelSpec, checkpoint: Path, dataset: Dataset, *, dry_run: bool
) -> tuple[Index, str]:
    """The dataset's index, with all its entries made unless this is a dry run; and what is left to encode."""
    prepared = caching.prepare(config, spec, checkpoint, dataset)
    if not prepared.todo:
        return prepared.index, ""
    if dry_run:
        return prepared.index, str(prepared.todo)
    console.note(f"encoding {prepared.todo}")
    caching.fill(caching.job_for(prepared, config, spec, checkpoint))
    return prepared.index, ""


def _make_room(output: Path, *, overwrite: bool, dry_run: bool) -> None:
    """See that a new run does not mix with an old one in the same folder."""
    there = checkpoints(output)
    if there and not overwrite:
        raise UsageError(
            f"{output} already holds a run, up to {there[-1].name}",
            "go on with --resume latest, choose another --output, or start anew with --overwrite",
        )
    if dry_run or not output.is_dir():
        return
    with explained(output, "clear"):
        for old in there:
            remove_folder(old)
        for name in ("metrics.jsonl", LORA_WEIGHTS_NAME):
            (output / name).unlink(missing_ok=True)
        remove_partials(output)


def describe(plan: Plan) -> list[tuple[str, str, str]]:
    """A plan as rows of key, value and where the value came from."""
    derived = [
        ("base model", str(plan.checkpoint), "model"),
        ("training size", str(plan.size), "size" if plan.config.size else "the model"),
        ("tokens per sample", f"{plan.tokens:,}", "size"),
        ("frames per second", f"{plan.fps:g}", "fps" if plan.config.fps else "the model"),
        ("samples", str(plan.samples), "data"),
        ("samples per step", str(plan.config.global_batch), "batch size x accumulation x processes"),
        ("optimizer steps", str(plan.total_steps), "epochs" if plan.config.epochs else "steps"),
        ("starts from", str(plan.resume) if plan.resume else "the base model", "--resume"),
    ]
    values = plan.config.to_dict()
    return [(key, str(value), plan.provenance[key]) for key, value in values.items()] + derived


def results(plan: Plan) -> list[str]:
    """What a finished run made, and the next command."""
    output = plan.config.output
    newest = checkpoints(output)[-1]
    where = shlex.quote(str(output))
    if plan.config.type == "lora":
        return [f"{output / LORA_WEIGHTS_NAME}", f"next: cogtune infer --lora {where}"]
    if plan.config.strategy == "ddp":
        return [f"{newest / 'transformer'}", f"next: cogtune infer --model {where}"]
    return [f"{newest}", f"next: cogtune merge-zero {shlex.quote(str(newest))}"]
