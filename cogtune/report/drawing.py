"""Pictures of clips, drawn in separate processes: a clip that kills or hangs its decoder only lacks its pictures."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cogtune.data.frames import ClipView
from cogtune.report.pictures import Shown, show_clip
from cogtune.system.pool import Beat, Lost, PoolOptions, processing

PATIENCE = 120.0
"""Seconds after which a process that draws one clip is taken to hang; it takes about one."""


@dataclass(frozen=True)
class Task:
    """A clip to draw: what :func:`cogtune.report.pictures.show_clip` takes."""

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
    """Yield each task's pictures, or the reason why there are none, in order; None stays None.

    Args:
        tasks: taken up a few at a time.
        workers: processes; 0 draws in this one.
        patience: seconds after which a process is taken to hang.
        draw: does one task; a function at the top of a module.
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
                yield f"{task.video.name}: the decoder hangs: it gave nothing for {patience:g} seconds"
            else:
                yield f"{task.video.name}: the decoder dies of it"


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)


def _attempt(draw: Draw, task: Task | None, _beat: Beat) -> Shown | str | None:
    try:
        return None if task is None else draw(task)
    except Exception as error:  # whatever it is: the check has given its verdict, and one clip is not the others
        return str(getattr(error, "message", error))
