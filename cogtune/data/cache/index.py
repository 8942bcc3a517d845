"""The cache entries of a dataset: their keys, and the jobs that make missing ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune.data.cache.store import Store
from cogtune.data.frames import ClipView, FrameSettings, view
from cogtune.data.sources import Sample
from cogtune.data.video.stamp import Stamp
from cogtune.models.geometry import Size
from cogtune.system.digests import digest
from cogtune.system.errors import CogtuneError
from cogtune.system.json_files import read_sealed, write_sealed

FORMAT = 2
"""Part of every key; increase it when the contents of entries change."""

READING, READING_IMAGES = 2, 3
"""Part of the keys of clips and images; increase it when other pixels are read from the same file."""


@dataclass(frozen=True, kw_only=True)
class CacheKeySettings:
    """What every entry depends on besides its clip or caption."""

    frames: FrameSettings
    """Which frames of each clip are read, at which size, and how they are fitted."""
    vae: str
    """Fingerprint of the VAE."""
    text: str
    """Fingerprint of the text encoder and its tokenizer."""
    max_tokens: int
    dtype: str
    """Precision of the encoders."""
    id_token: str
    with_image: bool
    """Whether the model is conditioned on an image."""


@dataclass(frozen=True)
class SampleKeys:
    """One training sample: the keys of its entries, and the size it is trained at."""

    id: str
    latents: str
    text: str
    image: str | None
    size: Size


@dataclass(frozen=True)
class Index:
    """All samples of a dataset for one cache key, and the key of the empty caption's embedding."""

    rows: tuple[SampleKeys, ...]
    null_text: str

    @property
    def digest(self) -> str:
        """A digest of a run's data: it changes with any clip, caption or setting."""
        return digest([[row.latents, row.text, row.image] for row in self.rows])

    def write(self, path: Path) -> None:
        """Save as JSON."""
        rows = [[row.id, row.latents, row.text, row.image, str(row.size)] for row in self.rows]
        write_sealed(path, {"format": FORMAT, "null_text": self.null_text, "rows": rows})

    @classmethod
    def read(cls, path: Path) -> Index:
        """Return the index saved at ``path``.

        Raises:
            CogtuneError: the file is missing or damaged.
        """
        value = read_sealed(path, "run `cogtune train` again")
        rows = (
            SampleKeys(id_, latents, text, image, Size.parse(size)) for id_, latents, text, image, size in value["rows"]
        )
        return cls(tuple(rows), value["null_text"])

    @property
    def buckets(self) -> dict[Size, tuple[int, ...]]:
        """The positions of the rows of each size, both in ascending order."""
        found: dict[Size, list[int]] = {}
        for position, row in enumerate(self.rows):
            found.setdefault(row.size, []).append(position)
        return {size: tuple(found[size]) for size in sorted(found)}


def caption_of(sample: Sample, id_token: str) -> str:
    """Return the training caption: the id token, if any, and the sample's caption."""
    return f"{id_token} {sample.caption}".strip()


@dataclass(frozen=True)
class ClipJob:
    """A clip to encode; ``stamp`` is its state when its key was made."""

    key: str
    video: Path
    frames: ClipView
    stamp: Stamp | None = None


@dataclass(frozen=True)
class TextJob:
    """A caption to encode."""

    key: str
    caption: str


@dataclass(frozen=True)
class ImageJob:
    """A conditioning frame to encode: an image file, or the first chosen frame of a clip.

    ``stamp`` is the file's state when its key was made.
    """

    key: str
    source: Path
    from_video: bool
    frames: ClipView
    stamp: Stamp | None = None


@dataclass(frozen=True)
class EncodeJobs:
    """Entries to make, each key once."""

    clips: tuple[ClipJob, ...]
    texts: tuple[TextJob, ...]
    images: tuple[ImageJob, ...]

    def __add__(self, other: EncodeJobs) -> EncodeJobs:
        return EncodeJobs(
            tuple({job.key: job for job in (*self.clips, *other.clips)}.values()),
            tuple({job.key: job for job in (*self.texts, *other.texts)}.values()),
            tuple({job.key: job for job in (*self.images, *other.images)}.values()),
        )

    def __len__(self) -> int:
        return len(self.clips) + len(self.texts) + len(self.images)

    def __str__(self) -> str:
        counts = ((len(self.clips), "clip"), (len(self.texts), "caption"), (len(self.images), "image"))
        return ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts if count) or "nothing"


def make_index(store: Store, samples: Sequence[Sample], recipe: CacheKeySettings) -> Index:
    """Return the keys of every sample's entries; reads only clips whose facts ``store`` does not know.

    Raises:
        CogtuneError: a clip cannot be read, or is too short.
    """
    rows = []
    for sample in samples:
        bytes_of_clip, seen = store.facts.digest(sample.video), _view_of(store, sample, recipe)
        picture = None
        if recipe.with_image:
            made_from = store.facts.digest(sample.image) if sample.image else bytes_of_clip
            picture = image_key(made_from, seen, from_video=sample.image is None)
        latents = digest(
            {
                "format": FORMAT,
                "reading": READING,
                "clip": bytes_of_clip,
                "indices": seen.indices,
                "fitted": _fitted(seen),
                "vae": recipe.vae,
                "dtype": recipe.dtype,
            }
        )
        rows.append(
            SampleKeys(sample.id, latents, text_key(caption_of(sample, recipe.id_token), recipe), picture, seen.size)
        )
    return Index(tuple(rows), text_key("", recipe))


def _view_of(store: Store, sample: Sample, recipe: CacheKeySettings) -> ClipView:
    """Return the view of a sample's clip that training sees.

    Raises:
        CogtuneError: the clip cannot be read, or is too short.
    """
    try:
        return view(store.facts.probe(sample.video), recipe.frames, store.facts.digest(sample.video))
    except ValueError as error:
        raise CogtuneError(f"{sample.video} {error}", "use a longer clip, or train on fewer frames") from error


def _fitted(seen: ClipView) -> list[Any]:
    """Return what the pixels of a clip's frames depend on besides the choice of frames."""
    crop = seen.crop
    trimmed = ["trimmed"] if seen.trimmed else []  # earlier versions encoded such clips with what is cropped now
    return [seen.size.height, seen.size.width, *crop.resized, crop.top, crop.left, *trimmed]


def jobs(store: Store, samples: Sequence[Sample], index: Index, recipe: CacheKeySettings) -> EncodeJobs:
    """Return the jobs for every entry of ``index``, existing ones included, each key once."""
    clips: dict[str, ClipJob] = {}
    texts: dict[str, TextJob] = {index.null_text: TextJob(index.null_text, "")}
    images: dict[str, ImageJob] = {}
    for sample, row in zip(samples, index.rows, strict=True):
        seen = _view_of(store, sample, recipe)
        stamp = store.facts.current(sample.video)
        clips.setdefault(row.latents, ClipJob(row.latents, sample.video, seen, stamp))
        texts.setdefault(row.text, TextJob(row.text, caption_of(sample, recipe.id_token)))
        if row.image is not None:
            source = sample.image or sample.video
            stamp = stamp if sample.image is None else store.facts.current(sample.image)
            images.setdefault(row.image, ImageJob(row.image, source, sample.image is None, seen.first_frame(), stamp))
    return EncodeJobs(tuple(clips.values()), tuple(texts.values()), tuple(images.values()))


def missing(store: Store, work: EncodeJobs) -> EncodeJobs:
    """Return the jobs in ``work`` without a complete entry in ``store``."""
    return EncodeJobs(
        tuple(job for job in work.clips if not store.holds("latents", job.key)),
        tuple(job for job in work.texts if not store.holds("text", job.key)),
        tuple(job for job in work.images if not store.holds("image", job.key)),
    )


def image_key(source: str, seen: ClipView, *, from_video: bool) -> str:
    """Return the key of a conditioning frame, from its file's digest.

    For a clip it depends only on the first frame; for an image file on no frame.
    """
    fitted = (
        [seen.indices[0], *_fitted(seen)]
        if from_video
        else [seen.size.height, seen.size.width, seen.reshape, seen.place]
    )
    reading = READING if from_video else READING_IMAGES
    return digest({"format": FORMAT, "reading": reading, "source": source, "video": from_video, "fitted": fitted})


def text_key(caption: str, recipe: CacheKeySettings) -> str:
    """Return the key of a caption's embedding."""
    return digest(
        {
            "format": FORMAT,
            "caption": caption,
            "encoder": recipe.text,
            "max_tokens": recipe.max_tokens,
            "dtype": recipe.dtype,
        }
    )
