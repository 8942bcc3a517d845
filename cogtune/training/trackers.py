"""TensorBoard, Weights & Biases and trackio: they get what ``metrics.jsonl`` and ``samples/`` hold.

A tracker gets metrics, sample videos and the run's configuration without paths, and nothing of the environment. One
that fails is reported once and left out; it never ends a run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cogtune.config.choices import SEPARATOR, Tracker
from cogtune.config.run_config import RunConfig, tagged
from cogtune.data.video.clips import iter_frames, probe
from cogtune.run.folder import RunFolder
from cogtune.system import console, names
from cogtune.system.errors import CogtuneError
from cogtune.system.json_files import read_json, write_json

PROJECT = "cogtune"

GIF_WIDTH = 320

Figures = Mapping[str, float]


@dataclass(frozen=True)
class TrackedVideo:
    """A sample video to show in a tracker."""

    prompt: str
    path: Path
    fps: float


class TrackerBackend(Protocol):
    """What every tracker implements."""

    def log(self, figures: Figures, step: int) -> None:
        """Show ``figures`` at ``step``."""

    def show(self, videos: Sequence[TrackedVideo], step: int) -> None:
        """Show sample videos at ``step``."""

    def close(self) -> None:
        """Send what is buffered, and end."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker records about a run."""

    name: str
    id: str
    folder: Path
    """The folder it may write to."""
    config: Mapping[str, Any]
    first_step: int


# ------------------------------------------------------------------------------------------------- the three


class TensorBoard:
    """Event files in ``logs/tensorboard``."""

    def __init__(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = info.folder / "tensorboard"
        # What an earlier, longer run wrote after the step that this one starts from is hidden.
        self._writer: Any = SummaryWriter(str(folder), purge_step=info.first_step + 1 if info.first_step else None)
        if not info.first_step:
            settings = "\n".join(f"    {key}: {value}" for key, value in info.config.items())
            self._writer.add_text("configuration", settings, 0)

    def log(self, figures: Figures, step: int) -> None:
        """Log scalars."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def show(self, videos: Sequence[TrackedVideo], step: int) -> None:
        """Show animated GIFs, the only videos that TensorBoard displays."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for number, video in enumerate(videos):
            gif, height, width = _gif(video)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
            summary = Summary(value=[Summary.Value(tag=f"samples/{number:02d} {video.prompt[:80]}", image=image)])
            self._writer.file_writer.add_summary(summary, step)
        self._writer.flush()

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WeightsAndBiases:
    """A run in the project ``WANDB_PROJECT``, else ``cogtune``; ``WANDB_MODE=offline`` keeps it on this machine."""

    def __init__(self, info: RunInfo) -> None:
        wandb = importlib.import_module("wandb")
        self._wandb = wandb
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            host="",  # else the name of this machine
            x_disable_meta=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=info.name,
            id=info.id,
            resume="allow",
            dir=str(info.folder),
            config=dict(info.config),
            settings=settings,
        )
        if self._run.url:
            console.note(f"wandb: {self._run.url}")

    def log(self, figures: Figures, step: int) -> None:
        """Log scalars."""
        self._run.log(dict(figures), step=step)

    def show(self, videos: Sequence[TrackedVideo], step: int) -> None:
        """Upload the mp4 files."""
        shown = {
            f"samples/{number:02d}": self._wandb.Video(str(video.path), caption=video.prompt, format="mp4")
            for number, video in enumerate(videos)
        }
        self._run.log(shown, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """A run in trackio's folder on this machine (``TRACKIO_DIR``), for ``trackio show``."""

    def __init__(self, info: RunInfo) -> None:
        self._trackio = importlib.import_module("trackio")
        self._run = self._trackio.init(
            project=PROJECT,
            name=f"{info.name}-{info.id}",  # trackio knows runs by their names
            config=dict(info.config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
        )

    def log(self, figures: Figures, step: int) -> None:
        """Log scalars."""
        self._run.log(dict(figures), step=step)

    def show(self, videos: Sequence[TrackedVideo], step: int) -> None:
        """Upload the mp4 files."""
        shown = {
            f"samples/{number:02d}": self._trackio.Video(str(video.path), caption=video.prompt, format="mp4")
            for number, video in enumerate(videos)
        }
        self._run.log(shown, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TRACKERS: dict[Tracker, Callable[[RunInfo], TrackerBackend]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def _gif(video: TrackedVideo) -> tuple[bytes, int, int]:
    """Return a video as an animated GIF of at most :data:`GIF_WIDTH`, with its height and width."""
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in iter_frames(video.path, range(probe(video.path).num_frames))]
    width = min(GIF_WIDTH, frames[0].width)
    size = (width, max(1, round(frames[0].height * width / frames[0].width)))
    small = [frame.resize(size) for frame in frames]
    data = io.BytesIO()
    small[0].save(data, "GIF", save_all=True, append_images=small[1:], duration=round(1000 / video.fps), loop=0)
    return data.getvalue(), size[1], size[0]


# ------------------------------------------------------------------------------------------------- all of them


class Trackers:
    """The trackers of a run, each used until it fails. Only the main process has any."""

    def __init__(self, config: RunConfig, *, first_step: int, enabled: bool) -> None:
        self._running: dict[Tracker, TrackerBackend] = {}
        for name in config.tracker if enabled else ():
            try:
                with _aside():
                    self._running[name] = TRACKERS[name](_about(config, name, first_step))
            except Exception as error:
                _left_out(name, error)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Show ``figures`` at ``step``."""
        self._each(lambda tracker: tracker.log(figures, step))

    def show(self, videos: Sequence[TrackedVideo], step: int) -> None:
        """Show sample videos at ``step``."""
        self._each(lambda tracker: tracker.show(videos, step))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_error: object) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[TrackerBackend], None]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                with _aside():
                    action(tracker)
            except Exception as error:
                del self._running[name]
                _left_out(name, error)


def _aside() -> contextlib.AbstractContextManager[object]:
    """Send what trackers print to the same place as other libraries' output: in a run, to its log."""
    return contextlib.redirect_stdout(sys.stderr)


def _left_out(name: Tracker, error: Exception) -> None:
    reason = (str(error).splitlines() or [""])[0]
    for key, value in os.environ.items():
        if value and key.endswith(("_TOKEN", "_KEY")):
            reason = reason.replace(value, "***")
    console.warn(f"logging to {name} failed and is turned off: {type(error).__name__}: {reason}")


def _about(config: RunConfig, tracker: Tracker, first_step: int) -> RunInfo:
    folder = RunFolder(config.output).logs
    folder.mkdir(parents=True, exist_ok=True)
    ids = _ids(folder) if first_step else {}
    if tracker not in ids:
        ids = {**_ids(folder), tracker: secrets.token_hex(4)}
        write_json(folder / names.TRACKERS, ids)
    return RunInfo(config.output.name, ids[tracker], folder, loggable_config(config), first_step)


def _ids(folder: Path) -> dict[str, str]:
    try:
        return dict(read_json(folder / names.TRACKERS))
    except CogtuneError:  # there are none yet
        return {}


def loggable_config(config: RunConfig) -> dict[str, Any]:
    """Return the configuration for trackers: only the last part of each path, and nothing about the network."""
    private = tagged("network")
    return {key: _without_folders(value) for key, value in config.to_dict().items() if key not in private}


def _without_folders(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return SEPARATOR.join(Path(part).name if part.startswith("/") else part for part in value.split(SEPARATOR))
