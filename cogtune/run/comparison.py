"""``compare.json``: what ``cogtune compare`` measured. Written by that command, read by reports and model cards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cogtune.system.errors import CogtuneError
from cogtune.system.json_files import is_sealed, write_sealed
from cogtune.system.reading import Schema, problems_in, read_object, refuse

FORMAT = 1
NAME = "compare.json"
PAGE = "compare.html"

SceneKind = Literal["prompt", "held-out", "unrelated"]
SignName = Literal["no effect", "too strong", "frozen", "burnt", "memorised", "forgot"]


class Look(Schema):
    """What one video looks like."""

    motion: float
    """Mean optical flow in pixels per frame, where there is something to see."""
    flicker: float
    """Mean change of brightness between frames, from 0 to 255, that motion does not explain."""
    saturation: float
    """Mean difference of the largest and the smallest of red, green and blue, from 0 to 1."""
    contrast: float
    """Standard deviation of a frame's brightness, from 0 to 1."""
    sharpness: float
    """Standard deviation of the Laplacian of a frame's brightness, from 0 to 1."""
    clipped: float
    """Fraction of the pixels with a channel at its lowest or highest value."""


LOOKS = tuple(Look.model_fields)


class Figures(Look):
    """The figures of one checkpoint at one strength; None for what could not be measured.

    Distances are in units of the mean distance between the base's own videos of different prompts.
    """

    loss: float | None = None
    """Loss at fixed noise of the validation samples."""
    training_loss: float | None = None
    """The same of the first training samples."""
    change: float | None = None
    """Distance from the base's videos of the same related prompts and seeds."""
    drift: float | None = None
    """Distance from the base's videos of the same unrelated prompts and seeds."""
    nearest: float | None = None
    """Distance to the nearest training clip, of prompts that were not trained on; 1 is that between two clips."""
    nearest_clip: str | None = None
    """The training clip that most of these videos are nearest to."""
    clip: float | None = None
    """Mean CLIP similarity of frames and prompt, from -1 to 1."""


@dataclass(frozen=True)
class FigureKind:
    """A figure for people: its heading, one line that explains it, and how it is written."""

    name: str
    """Its name in :class:`Figures`."""
    title: str
    meaning: str
    form: Callable[[float], str] = "{:.3g}".format
    unit: str = ""

    @property
    def heading(self) -> str:
        """The title with its unit, for a table without explanations."""
        title = self.title[0].upper() + self.title[1:]
        return f"{title}, {self.unit}" if self.unit else title


FIGURES = (
    FigureKind(
        "loss",
        "held-out loss",
        "Loss at fixed noise of the validation samples: lower is better, and it can be compared between rows.",
        "{:.4f}".format,
        unit="at fixed noise",
    ),
    FigureKind(
        "training_loss",
        "training loss",
        "The same of the first training samples. If only this one falls, the clips are learned by heart.",
        "{:.4f}".format,
        unit="at fixed noise",
    ),
    FigureKind(
        "motion",
        "motion",
        "Mean optical flow in pixels per frame, where there is something to see.",
        unit="pixels per frame",
    ),
    FigureKind(
        "flicker",
        "flicker",
        "Mean change of brightness between frames, of 255, that motion does not explain.",
        unit="of 255",
    ),
    FigureKind("saturation", "saturation", "Mean spread of a pixel's red, green and blue, from 0 to 1.", unit="0 to 1"),
    FigureKind("contrast", "contrast", "Standard deviation of the brightness in a frame, from 0 to 1.", unit="0 to 1"),
    FigureKind(
        "sharpness",
        "sharpness",
        "Standard deviation of the Laplacian of the brightness: fine edges and noise.",
        unit="0 to 1",
    ),
    FigureKind("clipped", "clipped", "Pixels with a channel at its lowest or highest value.", "{:.1%}".format),
    FigureKind(
        "change",
        "change",
        "Distance from the base's videos of related prompts; 1 is the distance between videos of two prompts.",
        "{:.2f}".format,
        unit="of related prompts, in distances of two prompts",
    ),
    FigureKind(
        "drift",
        "drift",
        "The same for unrelated prompts: what the training changed beyond its subject. Lower is better.",
        "{:.2f}".format,
        unit="the change of unrelated prompts",
    ),
    FigureKind(
        "nearest",
        "nearest clip",
        "Distance to the nearest training clip, of prompts that were not trained on; 1 is that between two clips.",
        "{:.2f}".format,
        unit="in distances of two clips",
    ),
    FigureKind("clip", "CLIP", "Mean CLIP similarity of frames and prompt, from -1 to 1: higher is better."),
)
"""In the order of tables."""


class Range(Schema):
    """The usual values of a figure."""

    low: float
    high: float


class Sign(Schema):
    """A sign that something is wrong, the figures that show it, and what to change."""

    name: SignName
    why: str
    advice: str


class Scene(Schema):
    """What all are asked for: a prompt, a first frame for image-to-video models, a seed."""

    prompt: str
    kind: SceneKind
    seed: int
    image: str | None = None
    """The name of the first frame's file."""
    trained: bool = False
    """Whether the prompt, or the first frame, is from the training data."""


class Row(Schema):
    """One checkpoint or file at one strength, or the base."""

    label: str
    weights: str | None
    """The file or folder, by its path in the run or else its name; None for the base."""
    digest: str | None
    """Of the weights."""
    step: int | None
    strength: float | None
    """None for the base, and for weights without a strength."""
    videos: list[str]
    """Of each scene, by its path in the folder of the comparison."""
    figures: Figures
    signs: list[Sign]

    @property
    def title(self) -> str:
        """The label with the strength, if it is not that of training."""
        return self.label if self.strength in (None, 1.0) else f"{self.label} at strength {self.strength:g}"


class Comparison(Schema):
    """Everything that was compared."""

    format: int = FORMAT
    version: str
    model: str
    scenes: list[Scene]
    base: Row
    rows: list[Row]
    clips: dict[str, Range]
    """The range of each look over the training clips; empty if they are not known."""
    clip_count: int
    grid: str | None
    chosen: int | None
    """The number of the row to take; None if none can be."""
    verdict: str

    @property
    def best(self) -> Row | None:
        """The row to take."""
        return None if self.chosen is None else self.rows[self.chosen]


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write a comparison to ``folder``, replacing an earlier one."""
    write_sealed(folder / NAME, comparison.model_dump(mode="json"))


def read_comparison(folder: Path) -> Comparison | None:
    """Read the comparison in ``folder``; None if there is none.

    Raises:
        CogtuneError: it is damaged, or was written by another version.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    value = read_object(path)
    if not is_sealed(value):
        raise CogtuneError(f"{path} is damaged: checksum mismatch", "run `cogtune compare` again")
    if value.get("format") != FORMAT:
        raise CogtuneError(f"{path} was written by another version of cogtune", "run `cogtune compare` again")
    refuse((f"{path}: {problem}" for problem in problems_in(value, Comparison)), "run `cogtune compare` again")
    found = Comparison.model_validate(value)
    if found.chosen is not None and not 0 <= found.chosen < len(found.rows):
        raise CogtuneError(f"{path} is damaged: it has no row {found.chosen}", "run `cogtune compare` again")
    return found
