"""Encoded samples on disk: each under a key of everything it was made from, written whole or not at all."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cogtune.data.sources import Sample
from cogtune.errors import CogtuneError
from cogtune.files import digest, digest_file, explained, read_json, remove_partials, write_atomic, write_json

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""Part of every key: raise it when what an entry holds changes."""

Kind = Literal["latents", "text", "image"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every entry depends on besides its own clip or caption."""

    frames: Mapping[str, Any]
    """Size, frame rate, start and reshape mode, as JSON-able values."""
    vae: str
    """Fingerprint of the VAE."""
    text: str
    """Fingerprint of the text encoder and its tokenizer."""
    max_tokens: int
    dtype: str
    """Precision the encoders ran in."""
    id_token: str
    with_image: bool
    """Whether the model is conditioned on an image."""


@dataclass(frozen=True)
class Row:
    """One training sample: the keys of its entries."""

    id: str
    latents: str
    text: str
    image: str | None


@dataclass(frozen=True)
class Index:
    """All samples of a dataset under one recipe, and where the empty caption's embedding is."""

    rows: tuple[Row, ...]
    null_text: str

    @property
    def digest(self) -> str:
        """What stands for the data of a run: any other clip, caption or setting gives another one."""
        return digest([[row.latents, row.text, row.image] for row in self.rows])

    def write(self, path: Path) -> None:
        """Save as JSON."""
        rows = [[row.id, row.latents, row.text, row.image] for row in self.rows]
        write_json(path, {"format": FORMAT, "null_text": self.null_text, "rows": rows})

    @classmethod
    def read(cls, path: Path) -> Index:
        """The index saved at ``path``."""
        value = read_json(path)
        return cls(tuple(Row(*row) for row in value["rows"]), value["null_text"])


def caption_of(sample: Sample, id_token: str) -> str:
    """The caption the model is trained with: the id token, if any, put in front."""
    return f"{id_token} {sample.caption}".strip()


@dataclass(frozen=True)
class ClipJob:
    """A clip that has no entry yet."""

    key: str
    video: Path


@dataclass(frozen=True)
class TextJob:
    """A caption that has no entry yet."""

    key: str
    caption: str


@dataclass(frozen=True)
class ImageJob:
    """A conditioning frame that has no entry yet: an image file, or the first chosen frame of a clip."""

    key: str
    source: Path
    from_video: bool


@dataclass(frozen=True)
class Todo:
    """What an index names and the store lacks, each key once."""

    clips: tuple[ClipJob, ...]
    texts: tuple[TextJob, ...]
    images: tuple[ImageJob, ...]

    def __len__(self) -> int:
        return len(self.clips) + len(self.texts) + len(self.images)

    def __str__(self) -> str:
        counts = ((len(self.clips), "clip"), (len(self.texts), "caption"), (len(self.images), "image"))
        return ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts if count) or "nothing"


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

    def index(self, samples: Sequence[Sample], recipe: Recipe) -> Index:
        """The keys of every sample's entries; reads only those clips whose digest is not remembered."""
        clip = {"format": FORMAT, "frames": recipe.frames, "vae": recipe.vae, "dtype": recipe.dtype}
        image = {"format": FORMAT, "frames": recipe.frames}
        rows = []
        for sample in samples:
            bytes_of_clip = self.file_digest(sample.video)
            picture = None
            if recipe.with_image:
                made_from = self.file_digest(sample.image) if sample.image else bytes_of_clip
                picture = digest(image | {"source": made_from, "video": sample.image is None})
            rows.append(
                Row(
                    sample.id,
                    digest(clip | {"clip": bytes_of_clip}),
                    _text_key(caption_of(sample, recipe.id_token), recipe),
                    picture,
                )
            )
        return Index(tuple(rows), _text_key("", recipe))

    def todo(self, samples: Sequence[Sample], index: Index, recipe: Recipe) -> Todo:
        """What has to be encoded before every entry of ``index`` is there."""
        clips: dict[str, ClipJob] = {}
        texts: dict[str, TextJob] = {index.null_text: TextJob(index.null_text, "")}
        images: dict[str, ImageJob] = {}
        for sample, row in zip(samples, index.rows, strict=True):
            clips.setdefault(row.latents, ClipJob(row.latents, sample.video))
            texts.setdefault(row.text, TextJob(row.text, caption_of(sample, recipe.id_token)))
            if row.image is not None:
                images.setdefault(row.image, ImageJob(row.image, sample.image or sample.video, sample.image is None))
        return Todo(
            tuple(job for key, job in clips.items() if not self.holds("latents", key)),
            tuple(job for key, job in texts.items() if not self.holds("text", key)),
            tuple(job for key, job in images.items() if not self.holds("image", key)),
        )


def _text_key(caption: str, recipe: Recipe) -> str:
    return digest(
        {
            "format": FORMAT,
            "caption": caption,
            "encoder": recipe.text,
            "max_tokens": recipe.max_tokens,
            "dtype": recipe.dtype,
        }
    )
