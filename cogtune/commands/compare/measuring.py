"""The figures of each of the weights at each strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogtune.commands.compare.candidates import Candidate
from cogtune.commands.compare.losses import Losses
from cogtune.commands.infer.making import Batch
from cogtune.data.video.generated import frames_of
from cogtune.quality.clip_similarity import ClipModel
from cogtune.quality.figures import MeasuredVideo, figures_of, measure_video
from cogtune.quality.references import MeasuredClips
from cogtune.run.comparison import Row, Scene
from cogtune.system import console


@dataclass(frozen=True)
class Entry:
    """The videos of weights at one strength, or of the base."""

    candidate: Candidate | None
    """None for the base."""
    batch: Batch
    paths: tuple[Path, ...]
    """Of each scene."""

    @property
    def scale(self) -> float:
        """What the strength of the LoRA is multiplied by."""
        (scale,) = self.batch.recipe.scales
        return scale

    @property
    def weights(self) -> str | None:
        """The file or folder, by its path in its run or else its name."""
        if self.candidate is None:
            return None
        path, run = Path(self.candidate.reference).absolute(), self.candidate.run
        return path.relative_to(run).as_posix() if run is not None and path.is_relative_to(run) else path.name

    @property
    def digest(self) -> str:
        """A digest of the weights at full strength: of a LoRA's file, else of the transformer."""
        facts = self.batch.videos[0].facts
        return str(facts["loras"][0]["digest"] if facts.get("loras") else facts["weights"])


def measured_rows(
    entries: Sequence[Entry],
    scenes: Sequence[Scene],
    clips: MeasuredClips,
    losses: Losses,
    clip_model: ClipModel | None,
    output: Path,
) -> list[Row]:
    """Measure all videos; return a row for each entry, without signs.

    Args:
        entries: the base's first.
        output: the folder of the comparison.
    """
    rows: list[Row] = []
    of_base: list[MeasuredVideo] = []
    with console.progress("measuring videos", len(scenes) * len(entries)) as progress:
        for entry in entries:
            videos, alike = [], []
            for scene, path in zip(scenes, entry.paths, strict=True):
                frames = frames_of(path)
                videos.append(measure_video(frames))
                if clip_model is not None:
                    alike.append(clip_model.similarity(frames, scene.prompt))
                progress.advance()
            of_base = of_base or videos
            measured = losses.of(entry.batch)
            more = {"loss": measured.held_out, "training_loss": measured.training}
            more["clip"] = float(np.mean(alike)) if alike else None
            is_lora = entry.candidate is not None and entry.candidate.is_lora
            row = Row(
                label="base" if entry.candidate is None else entry.candidate.label,
                weights=entry.weights,
                digest=entry.digest,
                step=None if entry.candidate is None else entry.candidate.step,
                strength=entry.scale if is_lora else None,
                videos=[path.relative_to(output).as_posix() for path in entry.paths],
                figures=figures_of(scenes, videos, of_base, clips).model_copy(update=more),
                signs=[],
            )
            rows.append(row)
    return rows
