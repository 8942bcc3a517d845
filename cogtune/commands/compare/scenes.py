"""The prompts, first frames and training clips of a comparison, from a run or as the user gives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogtune.commands.compare.request import UNRELATED, CompareRequest
from cogtune.commands.infer.request import Problems, files_asked, prompts_asked
from cogtune.commands.validate import read_for_training, validation_set, with_data_here
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.index import caption_of
from cogtune.data.frames import FrameSettings, load_clip, view
from cogtune.data.prompts import Prompt
from cogtune.data.sources import Sample
from cogtune.data.synthetic import draw_stills
from cogtune.data.video.clips import Pixels, probe
from cogtune.encoding.jobs import frame_settings
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.geometry import Size
from cogtune.run.comparison import Scene, SceneKind
from cogtune.run.run_yaml import read_run
from cogtune.system import console
from cogtune.system.digests import digest, digest_file
from cogtune.system.errors import CogtuneError
from cogtune.system.files import write_atomic


@dataclass(frozen=True)
class Asked:
    """What every candidate is asked for: a prompt, and the first frame for an image-to-video model."""

    prompt: str
    kind: SceneKind
    image: Path | None = None
    trained: bool = False
    """Whether the prompt, or the first frame, is from the training data."""

    def scene(self, seed: int) -> Scene:
        """Return it with a seed, as it is written down."""
        image = None if self.image is None else self.image.name
        return Scene(prompt=self.prompt, kind=self.kind, seed=seed, image=image, trained=self.trained)


@dataclass(frozen=True)
class RunData:
    """A run's settings and data, as far as they are there."""

    config: RunConfig | None = None
    settings: FrameSettings | None = None
    samples: tuple[Sample, ...] = ()
    held_out: tuple[Sample, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    """Those of the run's sample videos."""


def read_run_data(run: Path | None, data: Path | None, spec: ModelSpec) -> RunData:
    """Read the settings of a run and the list of its clips.

    Args:
        data: training clips in place of the run's.

    Raises:
        CogtuneError: ``data`` cannot be read. (If a run's own data cannot be, a warning says so.)
    """
    config = read_run(run).config if run is not None else None
    if data is not None:
        config = (config or RunConfig()).model_copy(update={"data": data, "validation_data": None})
    if config is None:
        return RunData()
    try:
        here = with_data_here(config, download=False).with_absolute_paths()
        dataset = read_for_training(here)
        watched = validation_set(here, spec, dataset, read_for_training) if dataset.samples else None
    except CogtuneError as error:
        if data is not None:
            raise
        console.warn(f"comparing without the training clips: {error.message}; --data FOLDER says where they are")
        return RunData(config)
    if watched is None:
        return RunData(here)
    return RunData(here, frame_settings(here, spec), dataset.samples, watched.samples, watched.prompts)


def scenes_of(
    request: CompareRequest, run: RunData, facts: dict[str, Any], spec: ModelSpec, size: Size, output: Path
) -> list[Asked]:
    """Return what every candidate is asked for, each once.

    Args:
        facts: what the weights say of their run.
        size: of the videos.
        output: the folder of the comparison, to which first frames of clips are written.

    Raises:
        UsageError: images do not fit the prompts or the model.
        CogtuneError: a file cannot be read or written.
    """
    frames = _FirstFrames(run.settings, size, output / "images")
    trained = {caption_of(sample, run.config.id_token) for sample in run.samples} if run.config else set()
    found = [*_related(request, run, facts, spec, frames)]
    for sample in run.held_out[: request.held_out]:
        image = (sample.image or frames.of_clip(sample.video)) if spec.image_to_video else None
        found.append(Asked(caption_of(sample, run.config.id_token if run.config else ""), "held-out", image))
    found += _unrelated(request, spec, frames)
    if spec.image_to_video:
        found = [one for one in found if one.image is not None]
    unique: dict[tuple[str, Path | None], Asked] = {}
    for one in found:
        unique.setdefault((one.prompt, one.image), replace(one, trained=one.trained or one.prompt in trained))
    return list(unique.values())


def _related(
    request: CompareRequest, run: RunData, facts: dict[str, Any], spec: ModelSpec, frames: _FirstFrames
) -> Iterator[Asked]:
    """Yield the user's prompts, else those of the run's sample videos, else a caption that was trained on."""
    problems = Problems()
    prompts = prompts_asked(request.prompts, problems)
    images = files_asked("--image", request.images, problems)
    if images and not spec.image_to_video:
        problems.lines.append("--image is not supported by a text-to-video model")
    if images and not prompts:
        problems.lines.append("--image: there is no --prompt that it could be the first frame of")
    elif images and len(images) not in (1, len(prompts)):
        problems.lines.append(f"--image: {len(images)} images for {len(prompts)} prompts; pass one, or one for each")
    if prompts and spec.image_to_video and not images and not run.samples:
        problems.lines.append("--image is required for an image-to-video model, with --prompt")
    problems.refuse()
    token = str(facts.get("id_token") or "")
    for number, prompt in enumerate(prompts):
        with_token = prompt if token.lower() in prompt.lower() else f"{token} {prompt}"
        if images or not spec.image_to_video:
            yield Asked(with_token, "prompt", images[number % len(images)] if images else None)
        else:
            yield Asked(with_token, "prompt", frames.of_sample(run.samples[number % len(run.samples)]), trained=True)
    if prompts:
        return
    own_images = run.config is not None and run.config.validation_images is not None
    for row in run.prompts:
        image = row.image if row.image is None or not row.from_video else frames.of_clip(row.image)
        yield Asked(row.text, "prompt", image, trained=image is not None and not own_images)
    if not run.prompts and facts.get("prompt") is not None:
        if not spec.image_to_video:
            yield Asked(facts["prompt"], "prompt", trained=True)
        elif run.samples:
            yield Asked(facts["prompt"], "prompt", frames.of_sample(run.samples[0]), trained=True)


def _unrelated(request: CompareRequest, spec: ModelSpec, frames: _FirstFrames) -> Iterator[Asked]:
    """Yield prompts that have nothing to do with the training data; drawn pictures are their first frames."""
    problems = Problems()
    prompts = prompts_asked(request.unrelated, problems, "--unrelated")
    problems.refuse()
    if not spec.image_to_video:
        yield from (Asked(prompt, "unrelated") for prompt in prompts or UNRELATED)
        return
    stills = draw_stills(len(prompts) or len(UNRELATED), frames.size.height, frames.size.width)
    for number, (caption, still) in enumerate(stills):
        yield Asked(prompts[number] if prompts else caption, "unrelated", frames.written(still))


@dataclass(frozen=True)
class _FirstFrames:
    """First frames for an image-to-video model, written to a folder as PNG."""

    settings: FrameSettings | None
    size: Size
    folder: Path

    def of_sample(self, sample: Sample) -> Path:
        """Return the image of a sample, or the first frame of its clip."""
        return sample.image or self.of_clip(sample.video)

    def of_clip(self, video: Path) -> Path:
        """Return the first frame of a clip that training reads, at the size of the videos.

        Raises:
            CogtuneError: the clip cannot be read, or is too short.
        """
        assert self.settings is not None  # clips come from a run's data
        settings = replace(self.settings, size=self.size, buckets=())
        try:
            seen = view(probe(video), settings, digest_file(video)).first_frame()
        except ValueError as error:
            raise CogtuneError(f"{video} {error}", "use a longer clip, or fewer --frames") from error
        return self.written(load_clip(video, seen)[0].permute(1, 2, 0).numpy())

    def written(self, picture: Pixels) -> Path:
        """Write a picture ``uint8 [H, W, 3]``, unless it is there; its name is a digest of its pixels."""
        from PIL import Image

        path = self.folder / f"{digest(picture.tobytes().hex())[:12]}.png"
        if not path.is_file():
            write_atomic(path, lambda aside: Image.fromarray(picture).save(aside, "PNG"))
        return path
