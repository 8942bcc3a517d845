"""Where the sample videos of a run lie, what they are called, and what each shows: for all who write or read them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cogtune.errors import CogtuneError
from cogtune.files import read_json, write_json

FOLDER = "samples"
"""In a run's folder."""

LIST_NAME = "samples.json"
"""In the folder of a step: what each of its videos shows."""

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class SampleEntry:
    """One video of a step."""

    prompt: str
    image: str | None
    """The file its first frame comes from, for an image-to-video model."""
    seed: int | None
    file: str
    """Its name in the step's folder."""


def step_folder(output: Path, step: int) -> Path:
    """Where the sample videos of a step are, or will be."""
    return output / FOLDER / f"step-{step:06d}"


def step_folders(output: Path) -> list[tuple[int, Path]]:
    """The steps that have sample videos, with their folders, in order."""
    found = ((_STEP.fullmatch(path.name), path) for path in (output / FOLDER).glob("*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def file_name(number: int, prompt: str) -> str:
    """What the video of prompt ``number`` is called."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return f"{number:02d}-{words[:40].strip('-') or 'video'}.mp4"


def write_list(folder: Path, entries: Sequence[SampleEntry]) -> None:
    """Say in the folder of a step what its videos show."""
    write_json(folder / LIST_NAME, [asdict(entry) for entry in entries])


def read_list(folder: Path) -> Iterator[SampleEntry]:
    """What the videos in the folder of a step show; what is damaged, gone or elsewhere is left out."""
    try:
        value = read_json(folder / LIST_NAME)
    except CogtuneError:
        return
    for entry in value if isinstance(value, list) else ():
        if not isinstance(entry, dict):
            continue
        name, image, seed = str(entry.get("file", "")), entry.get("image"), entry.get("seed")
        if Path(name).name == name and (folder / name).is_file():
            yield SampleEntry(
                str(entry.get("prompt", "")),
                str(image) if image else None,
                seed if isinstance(seed, int) else None,
                name,
            )


def prompt_of(video: Path) -> str | None:
    """The prompt of a sample video: from its folder's list, else from a text file of its name, as in a dataset."""
    for entry in read_list(video.parent):
        if entry.file == video.name:
            return entry.prompt.strip() or None
    text = video.with_suffix(".txt")
    return text.read_text(encoding="utf-8", errors="replace").strip() or None if text.is_file() else None
