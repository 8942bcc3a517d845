"""The cache from beginning to end: fill it, show its contents, verify them, delete what is unused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogtune.commands.validate import checked_dataset, read_for_training, validation_set, with_data_here
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.index import EncodeJobs
from cogtune.data.cache.store import CacheEntry, EntryKind, Store
from cogtune.data.prompts import ValidationSet
from cogtune.data.sources import Dataset
from cogtune.encoding import jobs
from cogtune.models.checkpoint_configs import ModelSpec, read_spec
from cogtune.models.locate import locate
from cogtune.run.plan import check_config
from cogtune.system import console
from cogtune.system.errors import CogtuneError, UsageError, counted
from cogtune.system.gpus import gpus
from cogtune.system.locks import exclusive_folder

READERS = 4
"""Entries read at a time, so that the disk can reorder requests."""


@dataclass(frozen=True)
class CacheResult:
    """The result of ``dataset cache``."""

    root: Path
    samples: int
    done: EncodeJobs | None
    """What was encoded; None if everything was cached."""
    results: tuple[dict[str, Any], ...]
    """Each process's result: the fields of :class:`cogtune.encoding.worker.EncodeOutcome`."""

    def __str__(self) -> str:
        everything = f"{counted(self.samples, 'sample')} in {self.root}"
        return f"encoded {self.done}: {everything}" if self.done else f"nothing to do: {everything}"

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-able values, with the figures of :func:`cogtune.encoding.jobs.totals`."""
        return {"cache": str(self.root), "samples": self.samples, **jobs.totals(self.results)}


def missing_entries(config: RunConfig) -> tuple[jobs.PreparedCache, ModelSpec]:
    """Find out which cache entries a dataset needs and which exist, without downloading or writing anything.

    Raises:
        CogtuneError: the dataset or the model is not on this machine, or a clip cannot be read.
    """
    config = with_data_here(config, download=False).with_absolute_paths()
    base_model_dir = locate(config.model, weights=False)
    spec = read_spec(base_model_dir)
    check_config(config, spec)
    dataset = read_for_training(config)
    watched = validation_set(config, spec, dataset, read_for_training)
    return jobs.prepare(config, spec, base_model_dir, dataset, watched, remember=False), spec


def fill(config: RunConfig, *, processes: int | None = None) -> CacheResult:
    """Encode what is missing of a dataset.

    Args:
        processes: number of processes; by default one per GPU, or fewer if there is little to do.

    Raises:
        UsageError: more processes than GPUs.
        CogtuneError: the dataset has errors, or encoding failed.
    """
    with suggest_cache_dir(config):
        return _fill(config, processes)


@contextlib.contextmanager
def suggest_cache_dir(config: RunConfig) -> Iterator[None]:
    """Add a hint about ``--cache-dir`` to an error about a cache that cannot be written.

    Raises:
        CogtuneError: the block's own.
    """
    root = jobs.store_of(config.with_absolute_paths()).root
    try:
        yield
    except CogtuneError as error:
        if error.message.startswith(f"cannot write {root}") and "--cache-dir" not in error.hint:
            error.hint = ", or ".join(filter(None, (error.hint, "put the cache elsewhere with --cache-dir")))
        raise


def _fill(config: RunConfig, processes: int | None) -> CacheResult:
    config = with_data_here(config).with_absolute_paths()
    base_model_dir = locate(config.model)
    spec = read_spec(base_model_dir)
    check_config(config, spec)
    dataset = checked_dataset(config, spec)
    here = len(gpus())
    if processes and here and processes > here:
        raise UsageError(
            f"--num-processes {processes} is more than the number of GPUs ({here})",
            "each process needs its own GPU",
        )
    config = config.model_copy(update={"num_processes": max(1, here), "num_machines": 1})
    watched = validation_set(config, spec, dataset)
    prepared, done, results = encode_missing(config, spec, base_model_dir, dataset, watched, processes=processes)
    return CacheResult(prepared.store.root, len(dataset.samples), done, tuple(results))


def encode_missing(
    config: RunConfig,
    spec: ModelSpec,
    base_model_dir: Path,
    dataset: Dataset,
    watched: ValidationSet,
    *,
    processes: int | None = None,
) -> tuple[jobs.PreparedCache, EncodeJobs | None, list[dict[str, Any]]]:
    """Encode what is missing; return the complete cache, what was encoded, and each process's result."""
    prepared = jobs.prepare(config, spec, base_model_dir, dataset, watched)
    if not prepared.todo:
        prepared.store.sweep_job()
        return prepared, None, []
    with exclusive_folder(prepared.store.root, wait=True):
        prepared.store.sweep()
        # another process may have been here meanwhile
        prepared = jobs.prepare(config, spec, base_model_dir, dataset, watched)
        if not prepared.todo:
            return prepared, None, []
        job = jobs.make_encode_plan(prepared, config, spec, base_model_dir, processes=processes)
        jobs.check_space(job, spec)
        console.note(f"encoding {prepared.todo}")
        results = jobs.fill_cache(job)
    return prepared, prepared.todo, results


@dataclass(frozen=True)
class CachePart:
    """Counts for one kind of entry: needed and cached, needed and missing, and the bytes of the cached ones."""

    cached: int
    missing: int
    size: int


@dataclass(frozen=True)
class CacheStatus:
    """What a cache holds for a dataset, and what else is in it."""

    root: Path
    samples: int
    parts: dict[str, CachePart]
    """By source: clips, captions, images."""
    others: int
    """Entries that this dataset under this configuration does not use, and their bytes."""
    others_size: int

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not any(part.missing for part in self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON-able values."""
        return {
            "cache": str(self.root),
            "samples": self.samples,
            "complete": self.complete,
            **{name: asdict(part) for name, part in self.parts.items()},
            "others": {"entries": self.others, "size": self.others_size},
        }


def look(config: RunConfig) -> CacheStatus:
    """Report what the cache holds for a dataset and what is missing, without writing anything.

    Raises:
        CogtuneError: the dataset or the model is not on this machine, or a clip cannot be read.
    """
    prepared, _ = missing_entries(config)
    sizes = {(entry.kind, entry.key): entry.size for entry in prepared.store.entries()}
    wanted, missing = _keys(prepared.jobs), _keys(prepared.todo)
    parts = {}
    for name, kind in (("clips", "latents"), ("captions", "text"), ("images", "image")):
        here = [key for key in wanted - missing if key[0] == kind]
        lost = sum(key[0] == kind for key in missing)
        parts[name] = CachePart(len(here), lost, sum(sizes.get(key, 0) for key in here))
    others = [size for key, size in sizes.items() if key not in wanted]
    return CacheStatus(prepared.store.root, len(prepared.index.rows), parts, len(others), sum(others))


def _keys(work: EncodeJobs) -> set[tuple[EntryKind, str]]:
    return {
        *(("latents", job.key) for job in work.clips),
        *(("text", job.key) for job in work.texts),
        *(("image", job.key) for job in work.images),
    }


def verify(config: RunConfig) -> tuple[int, list[tuple[Path, str]]]:
    """Read every entry of the cache in full, whatever run made it, and delete damaged ones.

    Returns:
        The number of entries read, and each damaged one with what is wrong with it.

    Raises:
        CogtuneError: the dataset or the model is not on this machine, or another process is filling the cache.
    """
    prepared, spec = missing_entries(config)
    store = prepared.store
    _require_cache(store)
    shapes = jobs.shapes(prepared.jobs, spec)
    with exclusive_folder(store.root):
        entries = list(store.entries())

        def read(entry: CacheEntry) -> str:
            return store.problem(entry.kind, entry.key, shapes.get((entry.kind, entry.key)))

        damaged = []
        with ThreadPoolExecutor(READERS) as pool, console.progress("entries", len(entries)) as progress:
            for entry, why in zip(entries, pool.map(read, entries), strict=True):
                if why:
                    store.delete(entry.kind, entry.key)
                    damaged.append((store.path(entry.kind, entry.key), why))
                progress.advance(1)
    return len(entries), damaged


def unused(config: RunConfig) -> tuple[Store, list[CacheEntry]]:
    """Find the cache's entries that this dataset does not use in this configuration.

    Raises:
        CogtuneError: the dataset or the model is not on this machine, or a clip cannot be read.
    """
    prepared, _ = missing_entries(config)
    _require_cache(prepared.store)
    wanted = _keys(prepared.jobs)
    return prepared.store, [entry for entry in prepared.store.entries() if (entry.kind, entry.key) not in wanted]


def delete(store: Store, entries: Sequence[CacheEntry]) -> None:
    """Delete entries, and what killed processes left unfinished.

    Raises:
        CogtuneError: one cannot be deleted, or another process is filling the cache.
    """
    with exclusive_folder(store.root):
        store.sweep()
        for entry in entries:
            store.delete(entry.kind, entry.key)


def _require_cache(store: Store) -> None:
    if not store.root.is_dir():
        raise CogtuneError(f"no cache in {store.root}", "run `cogtune dataset cache` to create it")
