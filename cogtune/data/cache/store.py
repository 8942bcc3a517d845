"""The store of cache entries on disk, with keys of everything that they are made from, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from cogtune.data.cache.facts import Facts
from cogtune.system import names
from cogtune.system.errors import CogtuneError
from cogtune.system.files import open_regular, os_errors_explained, write_atomic
from cogtune.system.folders import remove_leftovers, remove_partials

if TYPE_CHECKING:
    from torch import Tensor

EntryKind = Literal["latents", "text", "image"]

KINDS: tuple[EntryKind, ...] = get_args(EntryKind)

_SUFFIX = ".safetensors"
_CHECKSUM = "blake2b"


@dataclass(frozen=True)
class CacheEntry:
    """An existing entry and its size in bytes."""

    kind: EntryKind
    key: str
    size: int


class Store:
    """The folder of entries: ``latents/``, ``text/`` and ``image/``, one safetensors file per key.

    ``facts`` has facts about the files that entries are made from.
    """

    def __init__(self, root: Path, *, in_memory: int = 0) -> None:
        """Open a folder, which need not exist.

        Args:
            in_memory: bytes of entries to keep in memory once they were read, for a process that reads them often.
        """
        self.root = root
        self.facts = Facts(root / names.FACTS)
        self._room = in_memory
        self._kept: dict[tuple[EntryKind, str], Tensor] = {}

    def path(self, kind: EntryKind, key: str) -> Path:
        """Return the path of an entry, whether it exists or not."""
        return self.root / kind / key[:2] / f"{key}{_SUFFIX}"

    def holds(self, kind: EntryKind, key: str) -> bool:
        """Return whether a complete entry exists, by the length in its header. Links and pipes do not count."""
        try:
            descriptor = os.open(self.path(kind, key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                (length,) = struct.unpack("<Q", handle.read(8))
                if length > size - 8:
                    return False
                header = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return bool(ends) and bool(size == 8 + length + max(ends))
        except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return False

    def write(self, kind: EntryKind, key: str, tensor: Tensor) -> None:
        """Store one tensor under ``key``, with a checksum.

        Raises:
            CogtuneError: it cannot be written; nothing is left behind.
        """
        from safetensors.torch import save  # its save_file leaves a file of a name of its own when it is killed

        target, whole = self.path(kind, key), tensor.contiguous()
        metadata = {_CHECKSUM: _checksums(whole, f"{kind}/{key}")[0]}
        write_atomic(target, lambda aside: aside.write_bytes(save({"data": whole}, metadata)))

    def read(self, kind: EntryKind, key: str) -> Tensor:
        """Return the tensor stored under ``key``: latent moments ``[2C, F, h, w]``, text ``[L, D]``, image ``[3, H,
        W]``. It is not to be changed. Threads may read at once.

        Raises:
            CogtuneError: the entry is missing or damaged.
        """
        if (kept := self._kept.get((kind, key))) is not None:
            return kept
        tensor, why = self._look(kind, key)
        if tensor is None or why:
            raise CogtuneError(
                f"the cache entry {self.path(kind, key)} is missing or damaged: {why}",
                "run `cogtune dataset cache --verify` to delete damaged entries, then `cogtune dataset cache` to add "
                "missing ones, both with the run's run.yaml as --config",
            )
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._kept[kind, key] = tensor
        return tensor

    def _look(self, kind: EntryKind, key: str) -> tuple[Tensor | None, str]:
        """Return an entry's tensor and its problem, which is empty if its checksum matches."""
        from safetensors import SafetensorError, safe_open

        path = self.path(kind, key)
        try:
            open_regular(path).close()  # the library would wait for a pipe to be written
            with safe_open(path, "pt") as file:
                metadata, tensor = file.metadata() or {}, file.get_tensor("data")
        except (OSError, SafetensorError) as error:
            return None, f"cannot read it: {error}"
        if metadata.get(_CHECKSUM) not in _checksums(tensor, f"{kind}/{key}"):
            return tensor, "checksum mismatch"
        return tensor, ""

    def problem(self, kind: EntryKind, key: str, shape: tuple[int, ...] | None = None) -> str:
        """Return the problem of an entry, which is read completely; empty if it is valid.

        Args:
            shape: the expected shape; None if it is unknown.
        """
        import torch

        tensor, why = self._look(kind, key)
        if tensor is None or why:
            return why
        if shape is not None and tuple(tensor.shape) != shape:
            return f"its shape is {list(tensor.shape)}, not {list(shape)}"
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return "it has values that are not finite"
        return ""

    def entries(self) -> Iterator[CacheEntry]:
        """Yield every entry under its final name, whichever dataset or configuration made it."""
        for kind in KINDS:
            for folder in sorted((self.root / kind).glob("??")):
                with os.scandir(folder) as files:
                    found = [file for file in files if file.name.endswith(_SUFFIX) and not file.name.startswith(".")]
                for file in sorted(found, key=lambda file: file.name):
                    yield CacheEntry(kind, file.name.removesuffix(_SUFFIX), file.stat().st_size)

    def delete(self, kind: EntryKind, key: str) -> None:
        """Remove an entry, if it exists.

        Raises:
            CogtuneError: it cannot be removed.
        """
        path = self.path(kind, key)
        with os_errors_explained(path, "delete"):
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete leftovers of a killed process; called by the only process that fills the store."""
        for kind in KINDS:
            for folder in (self.root / kind).glob("??"):
                remove_partials(folder)
        self.sweep_job()

    def sweep_job(self) -> None:
        """Delete the reports of a killed process, but not of a running one."""
        remove_leftovers(self.root / names.JOB)


def _checksums(tensor: Tensor, name: str) -> tuple[str, str]:
    """Return the checksum of a tensor's bytes, type and shape with its key, and that of earlier versions without it."""
    import torch

    hasher = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    hasher.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    without = hasher.hexdigest()
    hasher.update(name.encode())
    return hasher.hexdigest(), without
