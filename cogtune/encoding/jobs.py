"""Filling the cache: missing entries are encoded in separate processes.

The job is a file, ``CACHE/job/plan.json``: what has to be encoded, and with what. ``python -m cogtune.encoding.worker``
does it, through ``accelerate launch`` when several GPUs share it. So the process that asks needs no torch, and the
encoders' memory is free again before training starts.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from cogtune.config.choices import Switch
from cogtune.config.launchers import accelerate_config
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.index import (
    CacheKeySettings,
    ClipJob,
    EncodeJobs,
    Index,
    jobs,
    make_index,
    missing,
)
from cogtune.data.cache.store import EntryKind, Store
from cogtune.data.frames import FrameSettings, settings_for
from cogtune.data.prompts import NOTHING, PromptRow, ValidationSet, prompt_jobs
from cogtune.data.sources import Dataset
from cogtune.data.video.clips import probe
from cogtune.models.checkpoint_configs import ModelSpec, fingerprint
from cogtune.models.geometry import Size, latent_frames
from cogtune.models.variants import Precision
from cogtune.run.launch import ENVIRONMENT, LAUNCHER, LaunchFiles
from cogtune.run.plan import fps_of, size_of, sizes_of
from cogtune.system import names
from cogtune.system import processes as process
from cogtune.system.containment import leads_out, refuse_links, refuse_links_out
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained, write_text
from cogtune.system.gpus import gpus
from cogtune.system.json_files import read_json, read_sealed, write_sealed


@dataclass(frozen=True)
class PreparedCache:
    """A dataset's index under one recipe, those of what the run is watched by, and what is not cached yet."""

    store: Store
    index: Index
    validation: Index
    prompts: tuple[PromptRow, ...]
    jobs: EncodeJobs
    """What makes each of their entries, there or not."""
    todo: EncodeJobs


def frame_settings(config: RunConfig, spec: ModelSpec) -> FrameSettings:
    """Return which frames of a clip are taken, and how they are fitted."""
    return FrameSettings(
        size=size_of(config, spec),
        fps=fps_of(config, spec),
        buckets=sizes_of(config, spec) if config.buckets else (),
        sampling=config.sampling,
        skip_start=config.skip_start,
        skip_end=config.skip_end,
        reshape=config.reshape,
        seed=config.seed,
    )


def clips_by_size(dataset: Dataset, settings: FrameSettings) -> dict[Size, int]:
    """Return how many samples are trained at each size; every clip is opened.

    Raises:
        CogtuneError: a clip cannot be read.
    """
    return dict(Counter(settings_for(probe(sample.video), settings).size for sample in dataset.samples))


def store_of(config: RunConfig) -> Store:
    """Return where the entries of a run's dataset are kept.

    Raises:
        CogtuneError: writing there would reach files elsewhere, by a link that leads out.
    """
    root = config.cache_folder
    if root == config.default_cache_folder and leads_out(root, config.data):
        hint = f"delete the link, or pass --cache-dir {root.resolve()} to use that folder"
        refuse_links([root], config.data, hint)
    refuse_links_out(root)
    return Store(root)


def prepare(
    config: RunConfig,
    spec: ModelSpec,
    base_model_dir: Path,
    dataset: Dataset,
    watched: ValidationSet = NOTHING,
    *,
    remember: bool = True,
) -> PreparedCache:
    """Work out every entry's key and look which are missing; nothing is encoded.

    Args:
        remember: write down the digests of clips that were read, for the next time.

    Raises:
        CogtuneError: a clip or the model cannot be read, or the cache folder not be written.
    """
    tokens = {part: fingerprint(base_model_dir, part) for part in ("text_encoder", "tokenizer")}
    recipe = CacheKeySettings(
        frames=frame_settings(config, spec),
        vae=fingerprint(base_model_dir, "vae"),
        text=f"{tokens['text_encoder']}-{tokens['tokenizer']}",
        max_tokens=spec.max_text_seq_length,
        dtype=config.precision,
        id_token=config.id_token,
        with_image=spec.image_to_video,
    )
    store = store_of(config)
    index = make_index(store, dataset.samples, recipe)
    validation = make_index(store, watched.samples, recipe)
    prompts, more = prompt_jobs(store, watched.prompts, recipe)
    if remember:
        store.facts.save()
    work = jobs(store, dataset.samples, index, recipe) + jobs(store, watched.samples, validation, recipe) + more
    return PreparedCache(store, index, validation, prompts, work, missing(store, work))


@dataclass(frozen=True)
class EncodeOptions:
    """How the work is done; none of it is part of an entry's key.

    ``workers`` decode clips for each process, None for as many as the cores allow, 0 for none but the process itself.
    """

    processes: int = 1
    workers: int | None = None
    tiling: Switch = "auto"
    compile: Switch = "auto"


_TODO = TypeAdapter(EncodeJobs)


@dataclass(frozen=True)
class EncodePlan:
    """What has to be encoded, and with what."""

    base_model_dir: Path
    store: Store
    precision: Precision
    max_tokens: int
    todo: EncodeJobs
    options: EncodeOptions

    def write(self, path: Path) -> None:
        """Save as JSON."""
        write_sealed(
            path,
            {
                "checkpoint": str(self.base_model_dir),
                "cache": str(self.store.root),
                "precision": self.precision,
                "max_tokens": self.max_tokens,
                "engine": asdict(self.options),
                "todo": _TODO.dump_python(self.todo, mode="json"),
            },
        )

    @classmethod
    def read(cls, path: Path) -> EncodePlan:
        """Return the job saved at ``path``.

        Raises:
            CogtuneError: there is none, or it is not what was saved.
        """
        value = read_sealed(path, "run `cogtune dataset cache` again")
        return cls(
            Path(value["checkpoint"]),
            Store(Path(value["cache"])),
            value["precision"],
            value["max_tokens"],
            _TODO.validate_python(value["todo"]),
            EncodeOptions(**value["engine"]),
        )


def make_encode_plan(
    prepared: PreparedCache, config: RunConfig, spec: ModelSpec, base_model_dir: Path, *, processes: int | None = None
) -> EncodePlan:
    """Plan the encoding of what ``prepared`` lacks; by default with as many processes as the work is worth."""
    if processes is None:
        most = min(config.local_processes, len(gpus()) or config.local_processes)
        processes = max(1, min(most, int(estimated_seconds(prepared.todo) // _START_SECONDS)))
    return EncodePlan(
        base_model_dir,
        prepared.store,
        config.precision,
        spec.max_text_seq_length,
        prepared.todo,
        EncodeOptions(processes, config.workers, config.vae_tiling, config.vae_compile),
    )


# ------------------------------------------------------------------------------------------ how much it is

_CLIP_SECONDS = 0.95 / (49 * 480 * 720)
_TEXT_SECONDS = 0.007
_TEXT_START = 10.0
_START_SECONDS = 30.0
"""Seconds on an H200: of a pixel of a clip, of a caption, of loading the text encoder, and of starting a process."""


def _clip_seconds(job: ClipJob) -> float:
    size = job.frames.size
    return _CLIP_SECONDS * size.num_frames * size.height * size.width


def estimated_seconds(work: EncodeJobs) -> float:
    """Return about how long one H200 takes."""
    return sum(map(_clip_seconds, work.clips)) + _TEXT_SECONDS * len(work.texts)


def share(work: EncodeJobs, rank: int, processes: int) -> EncodeJobs:
    """Return the part of the work that process ``rank`` does; the parts take about equally long.

    Captions go to as few processes as makes sense, since the text encoder takes long to load; clips are dealt out, the
    largest first, to whoever has least to do.
    """
    readers = max(1, min(processes, int(_TEXT_SECONDS * len(work.texts) // _TEXT_START)))
    loads = [0.0] * processes
    for reader in range(readers if work.texts else 0):
        loads[reader] = _TEXT_START + _TEXT_SECONDS * len(work.texts) / readers
    clips: list[ClipJob] = []
    for job in sorted(work.clips, key=_clip_seconds, reverse=True):
        least = loads.index(min(loads))
        loads[least] += _clip_seconds(job)
        if least == rank:
            clips.append(job)
    texts = work.texts[rank::readers] if rank < readers else ()
    return EncodeJobs(tuple(clips), texts, work.images[rank::processes])


_LATENT_CHANNELS = 16
_ENTRY_OVERHEAD = 4096
"""What a file takes beside its tensor: its header, and the rest of its last block."""


def shapes(work: EncodeJobs, spec: ModelSpec) -> dict[tuple[EntryKind, str], tuple[int, ...]]:
    """Return the shape of each entry that ``work`` makes, by kind and key."""
    found: dict[tuple[EntryKind, str], tuple[int, ...]] = {}
    for clip in work.clips:
        size = clip.frames.size
        found["latents", clip.key] = (
            2 * _LATENT_CHANNELS,
            latent_frames(size.num_frames),
            size.height // 8,
            size.width // 8,
        )
    for text in work.texts:
        found["text", text.key] = (spec.max_text_seq_length, spec.text_embed_dim)
    for image in work.images:
        found["image", image.key] = (3, image.frames.size.height, image.frames.size.width)
    return found


def bytes_needed(work: EncodeJobs, spec: ModelSpec, precision: Precision) -> int:
    """Return what the entries that ``work`` makes will take on the disk."""
    itemsize = 4 if precision == "fp32" else 2
    return sum(
        math.prod(shape) * (1 if kind == "image" else itemsize) + _ENTRY_OVERHEAD
        for (kind, _), shape in shapes(work, spec).items()
    )


def check_space(job: EncodePlan, spec: ModelSpec) -> None:
    """Check that the disk has room for a job's entries.

    Raises:
        CogtuneError: it has not, with both figures.
    """
    needed = bytes_needed(job.todo, spec, job.precision)
    with os_errors_explained(job.store.root):
        job.store.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(job.store.root).free
    if needed > free:
        raise CogtuneError(
            f"not enough disk space for the cache in {job.store.root}: it needs {format_bytes(needed)} more, "
            f"and {format_bytes(free)} are free",
            "free some space, use a smaller --size, or choose another --cache-dir",
        )


def format_bytes(count: int) -> str:
    """Return bytes as people say them, in units of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


# ------------------------------------------------------------------------------------------------- doing it


def result_path(folder: Path, rank: int) -> Path:
    """Return where process ``rank`` writes what it did."""
    return folder / f"result-{rank}.json"


def fill_cache(job: EncodePlan) -> list[dict[str, Any]]:
    """Run a job in separate processes; return each one's result.

    Raises:
        CogtuneError: it failed, or was stopped, or some clips could not be decoded; what is done stays done.
    """
    files = LaunchFiles(job.store.root / names.JOB)
    processes = job.options.processes
    job.write(files.plan)
    command = [sys.executable, "-m", "cogtune.encoding.worker", str(files.plan)]
    if processes > 1:
        launching = RunConfig(num_processes=processes, precision="fp32")
        write_text(files.accelerate, yaml.safe_dump(accelerate_config(launching, files.deepspeed)))
        command = [*LAUNCHER, *files.command(launching, "cogtune.encoding.worker", "--shared")[2:]]
    process.supervise(
        command,
        [files.report(rank) for rank in range(processes)],
        files.log,
        environment=ENVIRONMENT,
        if_stopped=lambda: "run the same command again to continue",
    )
    results = [read_json(result_path(files.folder, rank)) for rank in range(processes)]
    failures = [failure for result in results for failure in result["failures"]]
    if failures:
        noun = "a file" if len(failures) == 1 else f"{len(failures)} files"
        raise CogtuneError(
            f"cannot decode {noun}; everything else is cached",
            "run `cogtune dataset validate` for details; fix or remove them, then run the same command again",
            details=failures,
        )
    return results


def totals(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the processes of a job did together, JSON-able.

    Rates and shares leave out each process's first clip, before which it loads and compiles; ``seconds`` do not.
    """
    value: dict[str, Any] = {kind: sum(result[kind] for result in results) for kind in ("clips", "texts", "images")}
    if not results:
        return value
    steady = [result for result in results if result["steady_clips"]]
    waited = {what: sum(result["waited"][what] for result in results) for what in results[0]["waited"]}
    return value | {
        "processes": len(results),
        "seconds": max(result["total"] for result in results),
        "seconds_until_first_clip": max(result["first_clip"] for result in results),
        "clips_per_second": sum(result["steady_clips"] / result["steady"] for result in steady),
        "device_busy": sum(result["busy"] / result["steady"] for result in steady) / max(1, len(steady)),
        "seconds_waited_for": waited,
        "bottleneck": max(waited, key=lambda what: waited[what]),
        "peak_gib": {kind: max(result[f"{kind}_peak"] for result in results) for kind in ("text", "video")},
    }
