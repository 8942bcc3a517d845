"""What ``cogtune train`` does, from a configuration to a finished run: look, encode, plan, launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogtune.commands.run_summary import results
from cogtune.commands.validate import check_output, checked_dataset, read_for_training, validation_set, with_data_here
from cogtune.config.resolving import Resolved, resolve
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.index import EncodeJobs, Index, caption_of
from cogtune.data.cache.store import Store
from cogtune.data.frames import FrameSettings
from cogtune.data.prompts import ValidationSet, write_prompts
from cogtune.data.sources import Dataset
from cogtune.encoding import jobs
from cogtune.models.checkpoint_configs import ModelSpec, fingerprint, read_spec
from cogtune.models.geometry import Size
from cogtune.models.locate import locate
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run import launch
from cogtune.run.checkpoints import check_fits, checkpoints, checkpoints_after, choose_checkpoint, read_state
from cogtune.run.folder import RUN_NAME, RunFolder
from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import Plan, advice, check_config, make_plan, resume_fingerprint
from cogtune.run.run_yaml import read_run
from cogtune.system import console, names
from cogtune.system.containment import refuse_links_out
from cogtune.system.errors import CogtuneError, UsageError, counted
from cogtune.system.gpus import gpus
from cogtune.system.locks import WORKER_LOCK, exclusive_folder


@dataclass(frozen=True)
class PreparedRun:
    """A run that only has to be launched."""

    plan: Plan
    files: LaunchFiles
    left: str
    """What a dry run left to encode, in words; empty when all is cached."""


def configure(*, preset_name: str | None, file: Path | None, flags: Mapping[str, Any], resume: str | None) -> Resolved:
    """The configuration of a run; a resumed one starts from its own ``run.yaml`` unless told otherwise.

    Raises:
        UsageError: with every mistake, or there is nothing to resume from.
    """
    if resume is not None and flags.get("init_lora") is not None:
        raise UsageError(
            "--init-lora is for a new run: a resumed one has the weights of its checkpoint", "leave --init-lora out"
        )
    if resume is not None and file is None and preset_name is None:
        run = Path(flags.get("output", "out")) if resume == "latest" else Path(resume).absolute().parent
        refuse_links_out(run)
        if (RunFolder(run).run_yaml).is_file():
            resolved = read_run(run, flags)
            _tell_of_changes(resolved, choose_checkpoint(resume, run), flags)
            return resolved
        choose_checkpoint(resume, Path(flags.get("output", "out")))  # one that is not there is told before all else
        raise UsageError(
            f"{RunFolder(run).run_yaml} is missing, which says how the run was configured",
            "give the --preset or --config that it was started with",
        )
    return resolve(preset_name=preset_name, file=file, flags=flags)


def _tell_of_changes(resolved: Resolved, checkpoint: Path, flags: Mapping[str, Any]) -> None:
    """Warn of what a run's file says otherwise than the checkpoint was trained with: it may have been changed since."""
    trained = read_state(checkpoint).get("config")
    if not isinstance(trained, dict):
        return
    apart = ("output", "data", *flags)  # a run's folders may have moved, and flags are said again
    values = resolved.config.to_dict()
    changed = [
        f"{key}: {trained[key]!r} in {checkpoint.name}, {value!r} in {RUN_NAME}"
        for key, value in values.items()
        if key in trained and trained[key] != value and key not in apart
    ]
    if changed:
        console.warn(f"{RUN_NAME} was changed since {checkpoint.name} was saved: {'; '.join(changed)}")


@dataclass(frozen=True)
class CacheResult:
    """What ``dataset cache`` did."""

    root: Path
    samples: int
    done: EncodeJobs | None
    """What was encoded just now; None when all was there."""
    results: tuple[dict[str, Any], ...]
    """What each process did: the fields of :class:`cogtune.encoding.worker.EncodeOutcome`."""

    def __str__(self) -> str:
        everything = f"{counted(self.samples, 'sample')} in {self.root}"
        return f"encoded {self.done}: {everything}" if self.done else f"nothing to do: {everything}"

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values, with what :func:`cogtune.encoding.jobs.totals` tells."""
        return {"cache": str(self.root), "samples": self.samples, **jobs.totals(self.results)}


def survey(config: RunConfig) -> tuple[jobs.PreparedCache, ModelSpec]:
    """What a dataset needs of its cache, and what is there; nothing is downloaded or written.

    Raises:
        CogtuneError: the dataset or the model is not on this machine, or a clip cannot be read.
    """
    config = with_data_here(config, download=False).anchored()
    checkpoint = locate(config.model, weights=False)
    spec = read_spec(checkpoint)
    check_config(config, spec)
    dataset = read_for_training(config)
    watched = validation_set(config, spec, dataset, read_for_training)
    return jobs.prepare(config, spec, checkpoint, dataset, watched, remember=False), spec


def cache(config: RunConfig, *, processes: int | None = None) -> CacheResult:
    """Encode what is missing of a dataset.

    Args:
        processes: that share the work; by default one a GPU, or fewer where there is little to do.

    Raises:
        UsageError: more processes than GPUs.
        CogtuneError: something in the dataset stands in the way, or encoding failed.
    """
    with elsewhere_offered(config):
        return _cache(config, processes)


@contextlib.contextmanager
def elsewhere_offered(config: RunConfig) -> Iterator[None]:
    """Tell of a cache that cannot be written with the flag that puts it elsewhere.

    Raises:
        CogtuneError: the block's own.
    """
    root = jobs.store_of(config.anchored()).root
    try:
        yield
    except CogtuneError as error:
        if error.message.startswith(f"cannot write {root}") and "--cache-dir" not in error.hint:
            error.hint = ", or ".join(filter(None, (error.hint, "put the cache elsewhere with --cache-dir")))
        raise


def _cache(config: RunConfig, processes: int | None) -> CacheResult:
    config = with_data_here(config).anchored()
    checkpoint = locate(config.model)
    spec = read_spec(checkpoint)
    check_config(config, spec)
    dataset = checked_dataset(config, spec)
    here = len(gpus())
    if processes and here and processes > here:
        raise UsageError(
            f"--num-processes {processes}, and there {'is' if here == 1 else 'are'} {counted(here, 'GPU')}",
            "each process needs one of its own",
        )
    config = config.model_copy(update={"num_processes": max(1, here), "num_machines": 1})
    watched = validation_set(config, spec, dataset)
    prepared, done, results = _encoded(config, spec, checkpoint, dataset, watched, processes=processes)
    return CacheResult(prepared.store.root, len(dataset.samples), done, tuple(results))


def train(resolved: Resolved, *, resume: str | None, overwrite: bool) -> list[str]:
    """Get a run ready, launch it and wait for its end; what it made, in words.

    Raises:
        CogtuneError: something stands in the way, or the run failed or was stopped.
    """
    output = resolved.config.anchored().output
    is_main = resolved.config.machine_rank == 0  # other machines may share its output folder
    with run_lock(output) if is_main else contextlib.nullcontext():
        with elsewhere_offered(resolved.config):
            ready = prepare_run(resolved, resume=resume, overwrite=overwrite, dry_run=False)
        launch.start(ready.plan, ready.files)
    return results(ready.plan) if is_main else []


@contextlib.contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Hold a run's folder; refused while another run, or a worker that outlived its program, is at work there."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, and a run needs a folder", "choose another --output")
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
        resume: ``latest`` or a checkpoint's path, to go on from it.
        overwrite: let the run, once it is sure to start, delete what it makes anew.
        dry_run: download and encode nothing; only look, and write the files, into a folder of their own.
        only: gives the part of the dataset to train on, and then one sample video is enough.

    Raises:
        CogtuneError: with everything that stands in the way.
    """
    config = with_data_here(resolved.config, download=not dry_run).anchored()
    resolved = replace(resolved, config=config)
    if resume == "latest" and config.machine_rank and not checkpoints(config.output):
        raise UsageError(
            f"{config.output} has no checkpoint to resume from",
            "a run of several machines goes on only where all of them see the output folder of machine 0",
        )
    start_from = None if resume is None else choose_checkpoint(resume, config.output)
    if not overwrite:
        _refuse_to_overwrite(config.output, start_from)
    refuse_links_out(config.output)
    checkpoint = locate(config.model, weights=not dry_run)
    spec = read_spec(checkpoint)
    began_with = None
    if start_from is not None:
        began_with = read_state(start_from).get("init_lora")
    elif config.init_lora is not None:
        from cogtune.modeling.lora_files import describe_init, with_init_lora

        resolved = with_init_lora(resolved, spec, console.warn)
        config = resolved.config
        began_with = describe_init(config)
        targets = ", ".join(config.target_modules) if len(config.target_modules) < 9 else "its layers"
        told = f"rank {config.rank}, alpha {config.lora_alpha:g}, on {targets}"
        console.note(f"the run begins with {config.init_lora}: {told}")
    check_config(config, spec)
    for told in advice(config, spec):
        console.note(told)
    check_output(config)
    dataset = checked_dataset(config, spec)
    watched = validation_set(config, spec, dataset)
    if only is not None:
        dataset = only(dataset, jobs.frame_settings(config, spec))
        watched = replace(watched, prompts=watched.prompts[:1])
    if any((checkpoint / "transformer").glob("*.safetensors")):
        prepared = jobs.prepare(config, spec, checkpoint, dataset, watched)
        _check_start(start_from, config, *_made_of(config, checkpoint, prepared))  # before hours of encoding
        left = str(prepared.todo) if prepared.todo else ""
        if prepared.todo and not dry_run:
            prepared, left = _encoded(config, spec, checkpoint, dataset, watched)[0], ""
        identity, buckets = _made_of(config, checkpoint, prepared)  # of the clips as they were encoded
    else:  # a dry run with a model that is not on this machine
        nothing = Index((), "")
        none = EncodeJobs((), (), ())
        prepared = jobs.PreparedCache(Store(config.output), nothing, nothing, (), none, none)
        left, identity = f"everything, after downloading {config.model}", {}
        buckets = jobs.clips_by_size(dataset, jobs.frame_settings(config, spec))
        _check_start(start_from, config, identity, buckets)
    folder = names.DRY_RUN if dry_run else RunFolder(config.output).launch(config.machine_rank).name
    launch_folder = config.output / folder
    plan = make_plan(
        resolved,
        checkpoint=checkpoint,
        spec=spec,
        samples=len(dataset.samples),
        buckets=buckets,
        prompt=caption_of(dataset.samples[0], config.id_token),
        index=launch_folder / "index.json",
        validation=launch_folder / "validation.json" if prepared.validation.rows else None,
        prompts=launch_folder / "prompts.json" if prepared.prompts else None,
        identity=identity,
        resume=start_from,
        overwrite=overwrite,
        began_with=began_with,
    )
    files = launch.write_files(plan, resolved.to_yaml(), folder)
    _warn_of_overlap(prepared)
    prepared.index.write(plan.index)
    if plan.validation is not None:
        prepared.validation.write(plan.validation)
    if plan.prompts is not None:
        write_prompts(plan.prompts, prepared.prompts, prepared.index.null_text)
    return PreparedRun(plan, files, left)


def _made_of(
    config: RunConfig, checkpoint: Path, prepared: jobs.PreparedCache
) -> tuple[dict[str, Any], dict[Size, int]]:
    """What must be the same for a resumed run to be the same run, and the clips of each size."""
    identity = resume_fingerprint(config, base=fingerprint(checkpoint, "transformer"), data=prepared.index.digest)
    return identity, {size: len(positions) for size, positions in prepared.index.buckets.items()}


def _check_start(
    start_from: Path | None, config: RunConfig, identity: Mapping[str, Any], buckets: Mapping[Size, int]
) -> None:
    """Refuse a checkpoint that does not fit the run, or from which nothing is left to do."""
    if start_from is None:
        return
    state = read_state(start_from)
    check_fits(start_from, state, identity, model=config.model, samples=sum(buckets.values()))
    total, step = config.total_steps(*buckets.values()), int(state["step"])
    if step > total or (step == total and start_from.parent != config.output):  # nothing to do, or only to publish
        raise UsageError(f"{start_from} is at step {step}, and the run ends at {total}", "ask for more --steps")


def _warn_of_overlap(prepared: jobs.PreparedCache) -> None:
    trained_on = {row.latents for row in prepared.index.rows}
    both = [row.id for row in prepared.validation.rows if row.latents in trained_on]
    if both:
        console.warn(f"trained on too, so the validation loss says less: {', '.join(both)}")


def _encoded(
    config: RunConfig,
    spec: ModelSpec,
    checkpoint: Path,
    dataset: Dataset,
    watched: ValidationSet,
    *,
    processes: int | None = None,
) -> tuple[jobs.PreparedCache, EncodeJobs | None, list[dict[str, Any]]]:
    """What a run reads with every entry made, what was made just now, and how. One program at a time fills a cache."""
    prepared = jobs.prepare(config, spec, checkpoint, dataset, watched)
    if not prepared.todo:
        return prepared, None, []
    with exclusive_folder(prepared.store.root, wait=True):
        prepared.store.sweep()
        # another process may have been here meanwhile
        prepared = jobs.prepare(config, spec, checkpoint, dataset, watched)
        if not prepared.todo:
            return prepared, None, []
        job = jobs.job_for(prepared, config, spec, checkpoint, processes=processes)
        jobs.check_space(job, spec)
        console.note(f"encoding {prepared.todo}")
        results = jobs.fill_cache(job)
    return prepared, prepared.todo, results


def _refuse_to_overwrite(output: Path, start_from: Path | None) -> None:
    """See that a run does not take the place of what another made in the same folder.

    Raises:
        UsageError: there is something that it would take the place of.
    """
    if start_from is None:
        there = [path.name for path in checkpoints(output)]
        there += [name for name in (LORA_WEIGHTS_NAME,) if (output / name).is_file()]
        if there:
            raise UsageError(
                f"{output} already holds a run: {', '.join(there)}",
                "go on with --resume latest, choose another --output, or start anew with --overwrite",
            )
        return
    later = [path.name for path in checkpoints_after(output, int(read_state(start_from)["step"]))]
    if later:
        raise UsageError(
            f"{output} holds {', '.join(later)}, which a run from {start_from.name} would make anew",
            "use --overwrite to delete them, choose another --output, or --resume latest",
        )
