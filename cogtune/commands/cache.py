"""Cache maintenance: show its contents, verify them, delete what is unused."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogtune.commands import train
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.index import EncodeJobs
from cogtune.data.cache.store import CacheEntry, EntryKind, Store
from cogtune.encoding import jobs
from cogtune.system import console
from cogtune.system.errors import CogtuneError
from cogtune.system.locks import exclusive_folder

READERS = 4
"""Entries read at a time, so that the disk can reorder requests."""


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
    prepared, _ = train.missing_entries(config)
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
    prepared, spec = train.missing_entries(config)
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
    prepared, _ = train.missing_entries(config)
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
