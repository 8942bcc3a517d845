"""Pictures of clips, made in separate processes: a clip that crashes or hangs its decoder only lacks its pictures."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cogtune.data.frames import ClipView
from cogtune.report.pictures import Shown, show_clip
from cogtune.system.pool import Beat, Lost, PoolOptions, processing

PATIENCE = 120.0
"""Seconds after which a process counts as hung; a clip takes about one."""


@dataclass(frozen=True)
class Task:
    """A clip to show: the arguments of :func:`cogtune.report.pictures.show_clip`."""

    video: Path
    seen: ClipView
    image: Path | None
    most_bytes: int


Draw = Callable[[Task], Shown]


def draw(task: Task) -> Shown:
    """Return the pictures of one clip.

    Raises:
        CogtuneError: the clip or the image cannot be read.
    """
    return show_clip(task.video, task.seen, task.image, task.most_bytes)


def drawn(
    tasks: Iterable[Task | None], workers: int, *, patience: float = PATIENCE, draw: Draw = draw
) -> Generator[Shown | str | None, None, None]:
    """Yield each task's pictures, or the reason why there are none, in order; None for None.

    Args:
        tasks: started a few at a time.
        workers: number of processes; 0 for this one.
        patience: seconds after which a process counts as hung.
        draw: performs one task; must be a module-level function.
    """
    options = PoolOptions[Task | None](
        patience=patience,
        preload=["torch", "numpy", "av", "PIL.Image", "cogtune.data.frames"],
        prepare=_prepare,
        most_held=2 * workers + 1,
        ordered=True,
    )
    with processing(partial(_attempt, draw), tasks, workers, options) as results:
        for item in results:
            if item is None:
                continue
            _, task, found = item
            if task is None or not isinstance(found, Lost):
                yield None if isinstance(found, Lost) else found
            elif found.silence:
                yield f"{task.video.name}: the decoder hangs: no output for {patience:g} seconds"
            else:
                yield f"{task.video.name}: the decoder crashed"


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)


def _attempt(draw: Draw, task: Task | None, _beat: Beat) -> Shown | str | None:
    try:
        return None if task is None else draw(task)
    except Exception as error:  # whatever it is: the check has given its verdict, and one clip is not the others
        return str(getattr(error, "message", error))
