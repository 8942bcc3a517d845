"""``cogtune train`` from a configuration to a finished run: check, encode, plan, launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogtune.commands.cache import encode_missing, suggest_cache_dir
from cogtune.commands.run_summary import results
from cogtune.commands.validate import check_output, checked_dataset, validation_set, with_data_here
from cogtune.config.choices import FORMER_FORMATS
from cogtune.config.resolving import Resolved, resolve
from cogtune.config.run_config import RunConfig, tagged
from cogtune.data.cache.index import EncodeJobs, Index, caption_of
from cogtune.data.cache.store import Store
from cogtune.data.frames import FrameSettings
from cogtune.data.prompts import write_prompts
from cogtune.data.sources import Dataset
from cogtune.encoding import jobs
from cogtune.models.checkpoint_configs import ModelSpec, read_spec
from cogtune.models.checkpoint_configs import fingerprint as component_fingerprint
from cogtune.models.geometry import Size
from cogtune.models.locate import locate
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.planning.fit import local_hardware
from cogtune.planning.free_memory import with_free_memory
from cogtune.planning.host_memory import with_state
from cogtune.quality.references import choose_clips, write_clips
from cogtune.run import launch
from cogtune.run.checkpoints import check_fits, checkpoints, checkpoints_after, choose_checkpoint, read_state
from cogtune.run.folder import RUN_NAME, RunFolder
from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import Plan, advice, check_config, make_plan, resume_fingerprint
from cogtune.run.run_yaml import read_run
from cogtune.system import console, names
from cogtune.system.containment import refuse_links_out
from cogtune.system.errors import UsageError
from cogtune.system.locks import WORKER_LOCK, exclusive_folder

WATCHED_CLIPS = 16
"""Training clips that a run's sample videos are compared with."""


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to launch."""

    plan: Plan
    files: LaunchFiles
    left: str
    """What remains to be encoded after a dry run, as text; empty if everything is cached."""


def configure(*, preset_name: str | None, file: Path | None, flags: Mapping[str, Any], resume: str | None) -> Resolved:
    """Resolve the configuration of a run; a resumed run starts from its own ``run.yaml`` unless a file is given.

    Raises:
        UsageError: with every mistake, or if there is nothing to resume from.
    """
    if resume is not None:
        refuse_init_lora(flags)
    if resume is not None and file is None and preset_name is None:
        run = Path(flags.get("output", "out")) if resume == "latest" else Path(resume).absolute().parent
        refuse_links_out(run)
        if (RunFolder(run).run_yaml).is_file():
            resolved = read_run(run, flags)
            _warn_of_changes(resolved, choose_checkpoint(resume, run), flags)
            return resolved
        choose_checkpoint(resume, Path(flags.get("output", "out")))  # a missing one is reported before anything else
        raise UsageError(
            f"cannot resume: the run's configuration {RunFolder(run).run_yaml} is missing",
            "pass the --preset or --config that it was started with",
        )
    return resolve(preset_name=preset_name, file=file, flags=flags)


def refuse_init_lora(flags: Mapping[str, Any]) -> None:
    """Reject ``--init-lora`` for a run that resumes."""
    if flags.get("init_lora") is not None:
        raise UsageError(
            "--init-lora cannot be used with --resume", "remove --init-lora: the weights come from the checkpoint"
        )


def _warn_of_changes(resolved: Resolved, checkpoint: Path, flags: Mapping[str, Any]) -> None:
    """Warn about settings in ``run.yaml`` that differ from those the checkpoint was trained with."""
    trained = read_state(checkpoint).get("config")
    if not isinstance(trained, dict):
        return
    trained = trained | {"format": FORMER_FORMATS.get(trained.get("format"), trained.get("format"))}
    apart = ("output", "data", *flags)  # a run's folders may have moved, and flags are given again
    of_the_machine = tagged("machine")  # which it decides anew where they are left open
    values = resolved.config.to_dict()
    changed = [
        f"{key}: {trained[key]!r} in {checkpoint.name}, {value!r} in {RUN_NAME}"
        for key, value in values.items()
        if key in trained
        and trained[key] != value
        and key not in apart
        and not (value is None and key in of_the_machine)
    ]
    if changed:
        console.warn(f"{RUN_NAME} has changed since {checkpoint.name} was saved: {'; '.join(changed)}")


def train(resolved: Resolved, *, resume: str | None, overwrite: bool) -> list[str]:
    """Prepare a run, launch it and wait for it to finish; return what it wrote, as text.

    Raises:
        CogtuneError: the run cannot start, failed, or was stopped.
    """
    output = resolved.config.with_absolute_paths().output
    is_main = resolved.config.machine_rank == 0  # other machines may share its output folder
    with run_lock(output) if is_main else contextlib.nullcontext():
        with suggest_cache_dir(resolved.config):
            ready = prepare_run(resolved, resume=resume, overwrite=overwrite, dry_run=False)
        launch.start(ready.plan, ready.files)
    return results(ready.plan) if is_main else []


@contextlib.contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Lock a run's folder against other runs, and against a worker that outlived its launcher."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file, not a folder", "choose another --output")
    with exclusive_folder(output):
        with exclusive_folder(output, WORKER_LOCK):
            pass
        yield


def prepare_run(
    resolved: Resolved,
    *,
    resume: str | None,
    overwrite: bool,
    dry_run: bool,
    only: Callable[[Dataset, FrameSettings], Dataset] | None = None,
) -> PreparedRun:
    """Check everything, encode what is missing, and write the run's files.

    Args:
        resume: ``latest`` or the path of a checkpoint to resume from.
        overwrite: let the run delete an earlier run's checkpoints and samples once it is certain to start.
        dry_run: download and encode nothing; check, and write the files to a separate folder.
        only: returns the part of the dataset to train on; one sample video is made then.

    Raises:
        CogtuneError: with all reasons why the run cannot start.
    """
    config = with_data_here(resolved.config, download=not dry_run).with_absolute_paths()
    resolved = replace(resolved, config=config)
    if resume == "latest" and config.machine_rank and not checkpoints(config.output):
        raise UsageError(
            f"{config.output} has no checkpoint to resume from",
            "to resume on several machines, all of them must see the output folder of machine 0",
        )
    start_from = None if resume is None else choose_checkpoint(resume, config.output)
    if not overwrite:
        _refuse_to_overwrite(config.output, start_from)
    refuse_links_out(config.output)
    base_model_dir = locate(config.model, weights=not dry_run)
    spec = read_spec(base_model_dir)
    resolved, init_lora = _with_init_lora(resolved, spec, start_from)
    config = resolved.config
    check_config(config, spec)
    resolved = with_state(with_free_memory(_as_before(resolved, start_from), spec, local_hardware()), spec)
    config = resolved.config
    for told in advice(config, spec):
        console.note(told)
    check_output(config)
    dataset = checked_dataset(config, spec)
    watched = validation_set(config, spec, dataset)
    if only is not None:
        dataset = only(dataset, jobs.frame_settings(config, spec))
        watched = replace(watched, prompts=watched.prompts[:1])
    if any((base_model_dir / "transformer").glob("*.safetensors")):
        prepared, left = jobs.prepare(config, spec, base_model_dir, dataset, watched), ""
        # Before hours of encoding, and again below with the clips as they were encoded.
        _check_start(start_from, config, *_fingerprint_and_counts(config, base_model_dir, prepared))
        if dry_run:
            left = str(prepared.todo) if prepared.todo else ""
        elif prepared.todo:
            prepared = encode_missing(config, spec, base_model_dir, dataset, watched)[0]
        fingerprint, buckets = _fingerprint_and_counts(config, base_model_dir, prepared)
    else:  # a dry run with a model that is not on this machine
        prepared, left, fingerprint = _nothing_prepared(config), f"everything, after downloading {config.model}", {}
        buckets = jobs.clips_by_size(dataset, jobs.frame_settings(config, spec))
        _check_start(start_from, config, fingerprint, buckets)
    folder = names.DRY_RUN if dry_run else RunFolder(config.output).launch(config.machine_rank).name
    launch_folder = config.output / folder
    plan = make_plan(
        resolved,
        base_model_dir=base_model_dir,
        spec=spec,
        samples=len(dataset.samples),
        buckets=buckets,
        prompt=caption_of(dataset.samples[0], config.id_token),
        index=launch_folder / "index.json",
        validation=launch_folder / "validation.json" if prepared.validation.rows else None,
        prompts=launch_folder / "prompts.json" if prepared.prompts else None,
        fingerprint=fingerprint,
        resume=start_from,
        overwrite=overwrite,
        init_lora=init_lora,
    )
    files = launch.write_files(plan, resolved.to_yaml(), folder)
    _warn_of_overlap(prepared)
    _write_lists(plan, prepared, dataset)
    return PreparedRun(plan, files, left)


def _with_init_lora(
    resolved: Resolved, spec: ModelSpec, start_from: Path | None
) -> tuple[Resolved, dict[str, Any] | None]:
    """Take rank, alpha and layers from the LoRA that the run starts from; return its description, too."""
    if start_from is not None:
        return resolved, read_state(start_from).get("init_lora")
    if resolved.config.init_lora is None:
        return resolved, None
    from cogtune.modeling.lora_files import describe_init, with_init_lora

    resolved = with_init_lora(resolved, spec, console.warn)
    config = resolved.config
    targets = ", ".join(config.target_modules) if len(config.target_modules) < 9 else "its layers"
    console.note(f"starting from {config.init_lora}: rank {config.rank}, alpha {config.lora_alpha:g}, on {targets}")
    return resolved, describe_init(config)


def _nothing_prepared(config: RunConfig) -> jobs.PreparedCache:
    nothing, none = Index((), ""), EncodeJobs((), (), ())
    return jobs.PreparedCache(Store(config.output), nothing, nothing, (), none, none)


def _write_lists(plan: Plan, prepared: jobs.PreparedCache, dataset: Dataset) -> None:
    """Write the lists that the plan names (samples, validation samples, prompts), and that of clips to compare with."""
    prepared.index.write(plan.index)
    if plan.validation is not None:
        prepared.validation.write(plan.validation)
    if plan.prompts is not None:
        write_prompts(plan.prompts, prepared.prompts, prepared.index.null_text)
        clips = choose_clips(dataset.samples, jobs.frame_settings(plan.config, plan.spec), WATCHED_CLIPS)
        write_clips(plan.index.parent / names.CLIPS, clips)


def _as_before(resolved: Resolved, start_from: Path | None) -> Resolved:
    """Take formats that are not set from the checkpoint that the run resumes from."""
    trained = None if start_from is None else read_state(start_from).get("config")
    if not isinstance(trained, dict) or trained.get("strategy") != resolved.config.strategy:
        return resolved
    open_ = [key for key in ("master_weights", "moments") if getattr(resolved.config, key) is None]
    values = {key: trained[key] for key in open_ if trained.get(key) is not None}
    provenance = {**resolved.provenance, **dict.fromkeys(values, "--resume")}
    return replace(resolved, config=resolved.config.model_copy(update=values), provenance=provenance)


def _fingerprint_and_counts(
    config: RunConfig, base_model_dir: Path, prepared: jobs.PreparedCache
) -> tuple[dict[str, Any], dict[Size, int]]:
    """Return the run's resume fingerprint and the number of clips of each size."""
    base = component_fingerprint(base_model_dir, "transformer")
    fingerprint = resume_fingerprint(config, base=base, data=prepared.index.digest)
    return fingerprint, {size: len(positions) for size, positions in prepared.index.buckets.items()}


def _check_start(
    start_from: Path | None, config: RunConfig, fingerprint: Mapping[str, Any], buckets: Mapping[Size, int]
) -> None:
    """Reject a checkpoint that does not fit the run, or from which nothing is left to do."""
    if start_from is None:
        return
    state = read_state(start_from)
    check_fits(start_from, state, fingerprint, model=config.model, samples=sum(buckets.values()))
    total, step = config.total_steps(*buckets.values()), int(state["step"])
    if step > total or (step == total and start_from.parent != config.output):  # nothing to do, or only to publish
        raise UsageError(f"{start_from} is at step {step}, but the run ends at step {total}", "increase --steps")


def _warn_of_overlap(prepared: jobs.PreparedCache) -> None:
    trained_on = {row.latents for row in prepared.index.rows}
    both = [row.id for row in prepared.validation.rows if row.latents in trained_on]
    if both:
        console.warn(
            f"the validation loss is less meaningful, since these samples are also trained on: {', '.join(both)}"
        )


def _refuse_to_overwrite(output: Path, start_from: Path | None) -> None:
    """Reject a run that would replace what another run wrote to the same folder.

    Raises:
        UsageError: the folder holds such files.
    """
    if start_from is None:
        there = [path.name for path in checkpoints(output)]
        there += [name for name in (LORA_WEIGHTS_NAME,) if (output / name).is_file()]
        if there:
            raise UsageError(
                f"{output} already holds a run: {', '.join(there)}",
                "use --resume latest to continue it, --overwrite to start over, or choose another --output",
            )
        return
    later = [path.name for path in checkpoints_after(output, int(read_state(start_from)["step"]))]
    if later:
        raise UsageError(
            f"{output} holds {', '.join(later)}, which a run from {start_from.name} would replace",
            "use --overwrite to delete them, --resume latest to continue from the last one, or choose another --output",
        )
