"""Encoded samples on disk: each under a key of everything it was made from, written whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cogtune.errors import CogtuneError
from cogtune.files import digest_file, explained, read_json, remove_partials, write_atomic, write_json

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["latents", "text", "image"]


class Store:
    """The folder of entries: ``latents/``, ``text/`` and ``image/``, one safetensors file a key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashes: dict[str, list[Any]] | None = None

    def path(self, kind: Kind, key: str) -> Path:
        """Where the entry of ``key`` is, or will be."""
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def holds(self, kind: Kind, key: str) -> bool:
        """Whether a whole entry is there: its length is the one its header promises."""
        try:
            with self.path(kind, key).open("rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                (length,) = struct.unpack("<Q", handle.read(8))
                if length > size - 8:
                    return False
                header = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return bool(ends) and bool(size == 8 + length + max(ends))
        except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return False

    def write(self, kind: Kind, key: str, tensor: Tensor) -> None:
        """Store one tensor under ``key``."""
        from safetensors.torch import save_file

        target = self.path(kind, key)
        write_atomic(target, lambda aside: save_file({"data": tensor.contiguous()}, aside))

    def read(self, kind: Kind, key: str) -> Tensor:
        """The tensor stored under ``key``: latent moments ``[2C, F, h, w]``, text ``[L, D]``, image ``[3, H, W]``.

        Raises:
            CogtuneError: the entry is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(kind, key)
        try:
            return load_file(path)["data"]
        except (OSError, SafetensorError, KeyError) as error:
            raise CogtuneError(
                f"the cache entry {path} is missing or damaged: {error}", "run `cogtune dataset cache` again"
            ) from error

    def file_digest(self, path: Path) -> str:
        """A digest of the file's bytes, remembered by path, size and modification time."""
        hashes = self._remembered()
        with explained(path, "read"):
            stat = path.stat()
        known = hashes.get(str(path))
        stamp = [stat.st_size, stat.st_mtime_ns]
        if known is None or known[:2] != stamp:
            known = hashes[str(path)] = [*stamp, digest_file(path)]
        return str(known[2])

    def _remembered(self) -> dict[str, list[Any]]:
        if self._hashes is None:
            path = self.root / "files.json"
            try:
                self._hashes = dict(read_json(path))
            except CogtuneError:  # absent or damaged: it only saves time
                self._hashes = {}
        return self._hashes

    def remember(self) -> None:
        """Save the file digests for the next time."""
        write_json(self.root / "files.json", self._remembered())

    def sweep(self) -> None:
        """Delete what a killed process left unfinished; to be called by the one process that fills the store."""
        for kind in ("latents", "text", "image"):
            for folder in (self.root / kind).glob("??"):
                remove_partials(folder)
