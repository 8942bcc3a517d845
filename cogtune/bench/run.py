"""A bench from beginning to end: stage, launch, watch, and put the figures together."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogtune.bench import stage, watch, worker
from cogtune.bench.profile import EXTRA_STEPS
from cogtune.config.resolving import Resolved
from cogtune.config.run_config import RunConfig, tagged
from cogtune.data.cache.index import Index
from cogtune.models.checkpoint_configs import ModelSpec, read_spec
from cogtune.models.locate import spec_of
from cogtune.planning.estimate import check_arrangement, estimate
from cogtune.planning.fit import local_hardware, why_not_tried
from cogtune.planning.free_memory import with_free_memory
from cogtune.planning.host_memory import with_state
from cogtune.planning.measurements import GB, GIB, Measurement, Recipe
from cogtune.run import launch
from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import Plan, check_config, make_plan, resume_fingerprint, size_of
from cogtune.system import console
from cogtune.system.errors import CogtuneError, StoppedError, UsageError
from cogtune.system.gpus import gpus
from cogtune.system.json_files import read_json
from cogtune.system.scratch import scratch_folder
from cogtune.system.versions import versions

_FOLDER = "cogtune-bench-"

_PLAIN: dict[str, Any] = {
    "compile": False,
    "gradient_checkpointing": True,
    **dict.fromkeys(tagged("engine")),
}
"""The guides' recipe, beside which the base is loaded in fp32."""


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What to measure."""

    resolved: Resolved
    preset: str | None
    changes: Mapping[str, Any]
    """What was set beside the preset, on the command line or in a file."""
    steps: int
    """Steps that are timed."""
    warmup: int
    """Steps before those."""
    alone: bool = False
    """Measure one of the processes on one GPU, without the others."""
    keep: Path | None
    """A folder to keep model and samples in for the next time; None for one that is deleted."""
    command: str
    against: tuple[str, Resolved] | None = None
    """A preset of the same model to measure after it, by name."""
    trace: Path | None = None
    """A file for a trace of one more step of the first measurement."""


@dataclass(frozen=True)
class _Stage:
    folder: Path
    model: Path
    spec: ModelSpec
    cache: Path
    index: Path


@contextlib.contextmanager
def _staged(request: BenchRequest) -> Iterator[_Stage]:
    with scratch_folder(_FOLDER) as work:
        models = request.keep.absolute() if request.keep is not None else work
        job = _job(request.resolved.config, models)
        if not Path(job.model).is_dir():
            console.note(f"making {job.variant} with random weights")
        if not job.is_done:
            stage.prepare(job, work / "stage")
        model = Path(job.model)
        yield _Stage(work, model, read_spec(model), Path(job.cache), Path(job.index))


def _job(config: RunConfig, models: Path) -> stage.StagingJob:
    measured = stage.measured_as(config.model)
    if isinstance(measured, Path):
        model, name, scale = measured, "", ""
    else:
        name, scale = measured[0].name, measured[1]
        model = models / f"random-{scale}-{name}"
    samples = models / f"samples-{model.name}-{config.size}-{config.precision}"
    return stage.StagingJob(
        model=str(model),
        variant=name,
        scale=scale,
        cache=str(samples),
        index=str(samples / "index.json"),
        size=config.size,
        precision=config.precision,
    )


def bench(request: BenchRequest, recipes: Sequence[Recipe] = ("preset",)) -> Iterator[Measurement]:
    """Measure the real training step, once for each recipe; the first has to succeed.

    Raises:
        UsageError: the model's size is not known, it cannot do what is asked, or there are too few GPUs.
        StoppedError: it was stopped.
        CogtuneError: the run cannot be made, or failed.
    """
    if request.trace is not None and request.trace.is_dir():
        raise UsageError(f"--trace: {request.trace} is a folder", "pass a file, such as step.json")
    request = _narrowed(request)
    other = _other(request)
    if request.alone:
        console.note(
            f"measuring one of {request.resolved.config.num_processes} processes without the others; communication "
            "between them takes no time, and no memory for NCCL"
        )
    with _staged(request) as made:
        for recipe in recipes:
            try:
                yield _measure(request, made, recipe, is_last=recipe == recipes[-1] and other is None)
                request = replace(request, trace=None)
            except StoppedError:
                raise
            except CogtuneError as error:
                if recipe == recipes[0]:
                    raise
                console.warn(f"{recipe}: {error.message}")
        if other is not None:
            try:
                yield _measure(other, made, "preset", is_last=True)
            except StoppedError:
                raise
            except CogtuneError as error:
                console.warn(f"{other.preset}: {error.message}")


def _other(request: BenchRequest) -> BenchRequest | None:
    """Return the request for the preset that is compared, if there is one.

    Raises:
        UsageError: it is a preset of another model or size.
    """
    if request.against is None:
        return None
    name, resolved = request.against
    mine, theirs = request.resolved.config, resolved.config
    stage.measured_as(theirs.model)
    size = str(size_of(theirs, spec_of(theirs.model)))
    if (mine.model, mine.size) != (theirs.model, size):
        raise UsageError(
            f"--compare {name}: it trains {theirs.model} at {size}, and this run {mine.model} at {mine.size}",
            "compare presets of one model, at one size",
        )
    return _narrowed(
        replace(request, preset=name, resolved=resolved, changes={}, alone=False, against=None, trace=None)
    )


def _narrowed(request: BenchRequest) -> BenchRequest:
    """Return the request for one machine, at one size, with no tracker."""
    config = request.resolved.config
    stage.measured_as(config.model)  # refuses a model of unknown size
    spec = spec_of(config.model)
    config = config.model_copy(
        update={
            "num_machines": 1,
            "machine_rank": 0,
            "main_process_ip": None,
            "size": str(size_of(config, spec)),
            "frames": None,
            "buckets": (),
            "tracker": (),
        }
    )
    check_config(config, spec)
    machine = local_hardware()
    resolved = with_state(with_free_memory(replace(request.resolved, config=config), spec, machine), spec)
    config = resolved.config
    changes = {**request.changes, **{key: getattr(config, key) for key in resolved.momentary}}
    check_arrangement(config, spec)
    if request.alone:
        _check_alone(config)
    if found := why_not_tried(_present(request, config), estimate(config, spec), machine):
        several = config.num_processes > 1 and not request.alone
        raise UsageError(
            f"cannot measure {request.preset or 'this run'} on this machine: {'; '.join(found)}",
            "use `cogtune plan` to estimate it without a GPU"
            + (", or --num-processes N to measure it on N GPUs" if several else ""),
        )
    return replace(request, resolved=resolved, changes=changes)


def _check_alone(config: RunConfig) -> None:
    if config.num_processes == 1:
        raise UsageError("--alone requires a run of several processes", "pass --num-processes N")
    if config.strategy == "zero2":
        return
    why = {
        "ddp": "with ddp nothing is sharded over the processes",
        "zero2-offload": "with zero2-offload what is sharded is in host memory, which all processes share",
    }.get(config.strategy, f"with {config.strategy} a process needs the weights of the others")
    raise UsageError(f"--alone requires strategy zero2: {why}", "use `cogtune plan` to estimate the memory of each GPU")


def _present(request: BenchRequest, config: RunConfig) -> RunConfig:
    """Return the configuration of the processes that are started."""
    return config.model_copy(update={"num_processes": 1}) if request.alone else config


def _measure(request: BenchRequest, made: _Stage, recipe: Recipe, *, is_last: bool) -> Measurement:
    plan = _plan(request, made, recipe)
    files = launch.write_files(plan, request.resolved.to_yaml())
    present = replace(plan, config=_present(request, plan.config))
    if request.alone:
        launch.write_accelerate(files, present.config)
    called = recipe if request.preset is None or recipe == "plain" else request.preset
    console.note(f"{called}: {request.warmup} steps to warm up, {request.steps} timed")
    began = time.time()
    with watch.watched() as peaks, _log_outlived(files.log):
        words = [*(["--plain"] if recipe == "plain" else []), *(["--alone"] if request.alone else [])]
        words += ["--trace", str(request.trace.absolute())] if request.trace is not None else []
        missed = stage.NOTHING if recipe == "preset" else f"{recipe} was not measured"
        launch.start(present, files, "cogtune.bench.worker", *words, if_stopped=missed, is_last=is_last)
    return _measurement(request, plan, files, recipe, peaks, began)


@contextlib.contextmanager
def _log_outlived(log: Path) -> Iterator[None]:
    """Move a log that an error names to where it is not deleted with the bench's folder."""
    try:
        yield
    except CogtuneError as error:
        if str(log) not in error.hint or not log.is_file():
            raise
        handle, kept = tempfile.mkstemp(prefix=_FOLDER, suffix=".log")
        os.close(handle)
        shutil.copyfile(log, kept)
        hint = error.hint.replace(str(log), kept)
        raise CogtuneError(error.message, hint, details=error.details, exit_code=error.exit_code) from error


def _plan(request: BenchRequest, made: _Stage, recipe: Recipe) -> Plan:
    steps = request.warmup + request.steps + (0 if request.trace is None else EXTRA_STEPS)
    never = steps + 1
    changes: dict[str, Any] = {
        "data": made.folder,
        "cache_dir": made.cache,
        "output": made.folder / f"{recipe}-{request.preset or 'run'}",
        "steps": steps,
        "epochs": None,
        "warmup_steps": 0,
        "eval_every": 0,
        "checkpoint_every": never,
    }
    if recipe == "plain":
        changes |= _PLAIN
        if request.resolved.config.sharding.streams:
            changes |= {"strategy": "ddp", **dict.fromkeys(tagged("stream"))}
    config = request.resolved.config.model_copy(update=changes)
    index = Index.read(made.index)
    return make_plan(
        replace(request.resolved, config=config),
        base_model_dir=made.model,
        spec=made.spec,
        samples=len(index.rows),
        prompt="",
        index=made.index,
        fingerprint=resume_fingerprint(config, base="bench", data=index.digest),
        resume=None,
    )


def _measurement(
    request: BenchRequest, plan: Plan, files: LaunchFiles, recipe: Recipe, peaks: watch.Peaks, began: float
) -> Measurement:
    config = plan.config
    ranks = [read_json(worker.memory_file(files, rank)) for rank in range(_present(request, config).num_processes)]
    seconds = ranks[0]["seconds"]
    timed = seconds[request.warmup : request.warmup + request.steps]
    step = statistics.median(timed)
    tokens = (plan.tokens + plan.spec.max_text_seq_length) * config.global_batch
    cards = gpus()
    return Measurement(
        preset=request.preset,
        changes={key: value for key, value in request.changes.items() if key != "num_processes"},
        recipe=recipe,
        gpu=cards[0].name if cards else "cpu",
        gpus=config.num_processes,
        alone=request.alone,
        reserved_gib=_in(GIB, [rank["reserved"] for rank in ranks]),
        allocated_gib=_in(GIB, [rank["allocated"] for rank in ranks]),
        start_gib=_in(GIB, [rank["reserved_at_start"] for rank in ranks]),
        card_gb=max(_in(GB, peaks.cards)) if peaks.cards else None,
        host_gib=_in(GIB, [peaks.processes])[0],
        host_rise_gib=_in(GIB, [peaks.machine])[0],
        cgroup_gib=_in(GIB, [peaks.cgroup])[0] if peaks.cgroup is not None else None,
        step_s=round(step, 4),
        step_s_range=(min(timed), max(timed)),
        tokens_per_s=None if request.alone else round(tokens / step, 1),
        first_step_s=seconds[0],
        start_s=round(ranks[0]["ready"] - began, 1),
        date=time.strftime("%Y-%m-%d"),
        versions=versions(),
        command=request.command,
        arrangement=ranks[0]["arrangement"],
        retries=max(rank["retries"] for rank in ranks),
    )


def _in(unit: int, sizes: Sequence[int]) -> tuple[float, ...]:
    return tuple(round(size / unit, 3) for size in sizes)


def command_of(preset: str | None, flags: Mapping[str, Any], more: Sequence[str]) -> str:
    """Return the command line that gives the same bench again."""
    words = ["cogtune", "bench"]
    if preset is not None:
        words += ["--preset", preset]
    for key, value in flags.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            for item in value if isinstance(value, (list, tuple)) else [value]:
                words += [f"--{name}", str(item)]
    return shlex.join([*words, *more])
