"""Signs of a problem in a run's sample videos, each told once; the same that ``cogtune compare`` looks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cogtune.data.cache.index import Index
from cogtune.data.prompts import PromptRow
from cogtune.data.video.clips import Pixels, probe, read_frames
from cogtune.quality.figures import MeasuredVideo, figures_of, measure_video
from cogtune.quality.looks import ranges_of
from cogtune.quality.references import MeasuredClips, measure_clips, read_clips
from cogtune.quality.signs import Reference, Settings, find_signs
from cogtune.run.comparison import Scene, Sign
from cogtune.run.folder import RunFolder
from cogtune.run.metrics import read_metrics
from cogtune.run.plan import Plan
from cogtune.run.sample_videos import SampleEntry, read_list, step_folder
from cogtune.system import names

SIGNS = "signs"
"""In ``metrics.jsonl``: the names of the signs that were told at a step."""


class SampleSigns:
    """Compares each round of sample videos with those from before training, and with training clips."""

    def __init__(self, plan: Plan, index: Index, prompts: Sequence[PromptRow]) -> None:
        self._output, self._total = plan.config.output, plan.total_steps
        self._settings = Settings.of(plan.config, steps=plan.total_steps, clips=plan.samples)
        self._clips_file = plan.index.parent / names.CLIPS
        trained = {row.text for row in index.rows}, {row.image for row in index.rows if row.image is not None}
        self._trained = {row.prompt: row.text in trained[0] or row.image in trained[1] for row in prompts}
        self._measured: tuple[Mapping[SampleEntry, MeasuredVideo], MeasuredClips] | None = None
        self._told: set[str] | None = None

    def new_at(self, step: int) -> list[Sign]:
        """Return the signs in the sample videos of ``step`` that were not told before.

        Weights without an effect are told only once half of the run is done.

        Raises:
            CogtuneError: a video cannot be read.
        """
        if step == 0:
            return []
        base, clips = self._before_training()
        now = _videos(step_folder(self._output, step))
        shared = [entry for entry in now if entry in base]
        if not shared:
            return []
        scenes = [
            Scene(
                prompt=entry.prompt,
                kind="prompt",
                seed=entry.seed or 0,
                image=entry.image and Path(entry.image).name,
                trained=self._trained.get(entry.prompt, True),
            )
            for entry in shared
        ]
        before = [base[entry] for entry in shared]
        videos = [measure_video(_frames(now[entry])) for entry in shared]
        reference = Reference(
            base=figures_of(scenes, before, before, clips), clips=ranges_of(clips.looks), settings=self._settings
        )
        found = find_signs(figures_of(scenes, videos, before, clips), reference)
        early = {"no effect"} if 2 * step < self._total else set()
        new = [sign for sign in found if sign.name not in self._told_before() | early]
        self._told_before().update(sign.name for sign in new)
        return new

    def _before_training(self) -> tuple[Mapping[SampleEntry, MeasuredVideo], MeasuredClips]:
        """Return the sample videos from before training and the training clips, measured when first needed."""
        if self._measured is None:
            before = _videos(step_folder(self._output, 0))
            base = {entry: measure_video(_frames(path)) for entry, path in before.items()}
            clips = measure_clips(read_clips(self._clips_file)) if self._clips_file.is_file() else MeasuredClips()
            self._measured = base, clips
        return self._measured

    def _told_before(self) -> set[str]:
        """Return the names of the signs that were told, also before the run was resumed."""
        if self._told is None:
            said = [line.get(SIGNS) for line in read_metrics(RunFolder(self._output).metrics)]
            self._told = {str(name) for listed in said if isinstance(listed, list) for name in listed}
        return self._told


def _videos(folder: Path) -> dict[SampleEntry, Path]:
    """Return the videos of a step, without those of the weights' moving average."""
    return {entry: folder / entry.file for entry in read_list(folder) if not entry.averaged}


def _frames(video: Path) -> Pixels:
    return read_frames(video, range(probe(video).num_frames))
