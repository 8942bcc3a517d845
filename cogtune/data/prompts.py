"""The prompts of a run's sample videos, each with its cache entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cogtune.config.choices import SEPARATOR
from cogtune.config.resolving import MOST_YAML
from cogtune.config.run_config import RunConfig, is_list_file
from cogtune.data.cache.index import CacheKeySettings, EncodeJobs, ImageJob, TextJob, caption_of, image_key, text_key
from cogtune.data.cache.store import Store
from cogtune.data.findings import listed
from cogtune.data.frames import ClipView, FrameSettings, view
from cogtune.data.layouts.lines import NotTextError, as_utf8, listed_lines
from cogtune.data.layouts.nearest import look_alike
from cogtune.data.sources import Sample
from cogtune.system.errors import CogtuneError, UsageError, counted
from cogtune.system.files import read_bytes
from cogtune.system.json_files import read_sealed, write_sealed

FORMAT = 1


@dataclass(frozen=True)
class Prompt:
    """The prompt and first frame of one sample video.

    Args:
        text: the prompt, without the id token.
        image: for an image-to-video model, the image or clip that its first frame comes from.
        from_video: whether that file is a clip.
    """

    text: str
    image: Path | None = None
    from_video: bool = False


@dataclass(frozen=True)
class ValidationSet:
    """Held-out samples and prompts of sample videos, with which a run is evaluated."""

    samples: tuple[Sample, ...] = ()
    prompts: tuple[Prompt, ...] = ()


NOTHING = ValidationSet()


@dataclass(frozen=True)
class PromptRow:
    """A prompt with the keys of its entries; ``image_file`` is recorded with the video."""

    prompt: str
    text: str
    image: str | None
    image_file: str | None


def write_prompts(path: Path, rows: Sequence[PromptRow], null_text: str) -> None:
    """Save prompts as JSON, with the key of the empty prompt."""
    write_sealed(path, {"format": FORMAT, "null_text": null_text, "prompts": [asdict(row) for row in rows]})


def load_prompts(path: Path) -> tuple[tuple[PromptRow, ...], str]:
    """Return the prompts saved at ``path``, and the key of the empty prompt.

    Raises:
        CogtuneError: the file is missing or damaged.
    """
    value = read_sealed(path, "run `cogtune train` again")
    return tuple(PromptRow(**row) for row in value["prompts"]), value["null_text"]


def prompt_jobs(
    store: Store, prompts: Sequence[Prompt], recipe: CacheKeySettings
) -> tuple[tuple[PromptRow, ...], EncodeJobs]:
    """Return the rows of prompts, and the jobs that encode them."""
    rows, texts, images = [], [], []
    for prompt in prompts:
        text, image = text_key(prompt.text, recipe), None
        texts.append(TextJob(text, prompt.text))
        if prompt.image is not None:
            seen = _view_of(store, prompt.image, recipe.frames, from_video=prompt.from_video)
            image = image_key(store.facts.digest(prompt.image), seen, from_video=prompt.from_video)
            stamp = store.facts.current(prompt.image)
            images.append(ImageJob(image, prompt.image, prompt.from_video, seen, stamp))
        rows.append(PromptRow(prompt.text, text, image, str(prompt.image) if prompt.image else None))
    return tuple(rows), EncodeJobs((), tuple(texts), tuple(images))


def _view_of(store: Store, file: Path, frames: FrameSettings, *, from_video: bool) -> ClipView:
    """Return the first frame of a sample video: an image fitted as for sampling, or the first training frame of a clip.

    Raises:
        CogtuneError: the clip cannot be read.
    """
    size = replace(frames.size, num_frames=1)
    if not from_video:
        return ClipView((0,), size, (size.height, size.width))
    seen = view(store.facts.probe(file), frames, store.facts.digest(file))
    return ClipView(seen.indices[:1], size, seen.source, trimmed=seen.trimmed)


def choose_prompts(config: RunConfig, samples: Sequence[Sample], *, with_image: bool) -> tuple[Prompt, ...]:
    """Return the prompts of a run's sample videos; empty for a run that makes none.

    The default prompt is the first caption; the default images of an image-to-video model are the first frames of the
    first samples.

    Args:
        samples: of the training data.
        with_image: whether the model is conditioned on an image.

    Raises:
        UsageError: the prompts or images are invalid; lists all problems.
        CogtuneError: a list cannot be read.
    """
    if config.validation_images is not None and config.validation_prompts is None:
        raise UsageError("validation_images requires validation_prompts, one for each image")
    if not config.sample_interval(len(samples)):
        return ()
    problems: list[str] = []
    texts = _listed(config.validation_prompts, "validation_prompts", problems)
    images = [Path(name) for name in _listed(config.validation_images, "validation_images", problems)]
    if images and not with_image:
        problems.append("validation_images: not supported by a text-to-video model")
    if images and texts and len(images) != len(texts):
        counts = f"{counted(len(images), 'image')} for {counted(len(texts), 'prompt')}"
        problems.append(f"validation_images: {counts}")
    problems += [
        f"validation_images: no such file: {image}{look_alike(image)}"
        for image in images
        if image != Path() and not image.is_file()
    ]
    if problems:
        raise UsageError("cannot make sample videos", details=problems)
    texts = texts or [caption_of(samples[0], config.id_token)]
    if not with_image:
        return tuple(Prompt(text) for text in texts)
    if images:
        return tuple(Prompt(text, image) for text, image in zip(texts, images, strict=True))
    lent = [samples[number % len(samples)] for number in range(len(texts))]
    return tuple(
        Prompt(text, sample.image or sample.video, sample.image is None)
        for text, sample in zip(texts, lent, strict=True)
    )


def _listed(value: str | None, key: str, problems: list[str]) -> list[str]:
    """Return the entries of a list: lines of a text file, whose paths are relative to it, or parts of a value."""
    if value is None:
        return []
    if not is_list_file(value):
        parts = [part.strip() for part in value.split(SEPARATOR)]
        if not all(parts):
            problems.append(f"{key}: empty part between {SEPARATOR}")
        return parts
    path = Path(value)
    try:
        data = read_bytes(path, MOST_YAML)
    except CogtuneError as error:
        problems.append(f"{key}: {error.message}{look_alike(path)}")
        return []
    try:
        lines = listed_lines(as_utf8(data)[0])
    except NotTextError as error:
        problems.append(f"{key}: {path} {error}")
        return []
    not_utf8 = [number for number, line in enumerate(lines, 1) if not isinstance(line, str)]
    blank = [number for number, line in enumerate(lines, 1) if line == ""]
    if not_utf8:
        problems.append(f"{key}: {path} is not UTF-8 in {_lines(not_utf8)}")
    if blank:
        problems.append(f"{key}: {path} is blank in {_lines(blank)}")
    if not lines:
        problems.append(f"{key}: {path} is empty")
    entries = [line if isinstance(line, str) else "" for line in lines]  # what is wrong with these is told already
    if key == "validation_images":
        return [str(path.parent / entry) if entry else "" for entry in entries]
    return entries


def _lines(numbers: Sequence[int]) -> str:
    return f"{'line' if len(numbers) == 1 else 'lines'} {listed(numbers)}"
