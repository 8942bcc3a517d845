"""Encoded samples on disk: each under a key of everything it was made from, written whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cogtune.data.facts import Facts
from cogtune.errors import CogtuneError
from cogtune.files import remove_partials, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["latents", "text", "image"]


class Store:
    """The folder of entries: ``latents/``, ``text/`` and ``image/``, one safetensors file a key.

    ``facts`` is what is remembered of the files that entries are made from.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.facts = Facts(root / "files.json")

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

    def sweep(self) -> None:
        """Delete what a killed process left unfinished; to be called by the one process that fills the store."""
        for kind in ("latents", "text", "image"):
            for folder in (self.root / kind).glob("??"):
                remove_partials(folder)
