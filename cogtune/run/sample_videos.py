"""Where the sample videos of a run lie, what they are called, and what each shows: for all who write or read them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cogtune.run.folder import RunFolder
from cogtune.system import console, names
from cogtune.system.errors import CogtuneError
from cogtune.system.files import read_bytes
from cogtune.system.json_files import read_json, write_json
from cogtune.system.reading import Schema, problems_in, refuse

LIST_NAME = names.SAMPLES_LIST
"""In the folder of a step: what each of its videos shows."""


@dataclass(frozen=True)
class SampleEntry:
    """One video of a step."""

    prompt: str
    image: str | None
    """The file its first frame comes from, for an image-to-video model."""
    seed: int | None
    file: str
    """Its name in the step's folder."""
    averaged: bool = False
    """Whether it was made with the moving average of the weights."""


def step_folder(output: Path, step: int) -> Path:
    """Return where the sample videos of a step are, or will be."""
    return RunFolder(output).samples / f"step-{step:06d}"


def step_folders(output: Path) -> list[tuple[int, Path]]:
    """Return the steps that have sample videos, with their folders, in order."""
    found = (
        (names.STEP_NAME.fullmatch(path.name), path) for path in RunFolder(output).samples.glob("*") if path.is_dir()
    )
    return sorted((int(match[1]), path) for match, path in found if match)


def file_name(number: int, prompt: str) -> str:
    """Return what the video of prompt ``number`` is called."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return f"{number:02d}-{words[:40].strip('-') or 'video'}.mp4"


def write_list(folder: Path, entries: Sequence[SampleEntry]) -> None:
    """Write the list of a step's videos to its folder."""
    write_json(folder / LIST_NAME, [asdict(entry) for entry in entries])


def read_list(folder: Path) -> Iterator[SampleEntry]:
    """Yield what the videos in the folder of a step show; those that are gone or elsewhere are left out.

    A damaged list is warned of, and none of it is taken.
    """
    path = folder / LIST_NAME
    if not path.exists():
        return
    try:
        value = read_json(path)
        values = value if isinstance(value, list) else [value]
        refuse((f"{path}: {problem}" for entry in values for problem in problems_in(entry, _Entry)), "")
    except CogtuneError as error:
        for problem in error.details or (error.message,):
            console.warn(f"ignoring sample videos: {problem}")
        return
    for entry in map(_Entry.model_validate, values):
        if Path(entry.file).name == entry.file and (folder / entry.file).is_file():
            yield SampleEntry(entry.prompt, entry.image, entry.seed, entry.file, entry.averaged)


class _Entry(Schema):
    """What the list says of one video."""

    file: str
    prompt: str = ""
    image: str | None = None
    seed: int | None = None
    averaged: bool = False


def said_of(video: Path) -> list[Path]:
    """Return the files that :func:`prompt_of` reads for a video, as far as they are there."""
    return [path for path in (video.parent / LIST_NAME, video.with_suffix(".txt")) if path.is_file()]


def prompt_of(video: Path) -> str | None:
    """Return the prompt of a sample video: from its folder's list, else from a text file of its name, as in a
    dataset."""
    for entry in read_list(video.parent):
        if entry.file == video.name:
            return entry.prompt.strip() or None
    text = video.with_suffix(".txt")
    return read_bytes(text, 1 << 20).decode(errors="replace").strip() or None if text.is_file() else None
