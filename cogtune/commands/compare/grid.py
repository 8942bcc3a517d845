"""One video of all: a row for each prompt and seed, a column for each of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cogtune.data.layouts import own_files
from cogtune.data.video.clips import Pixels, iter_frames, probe, write_video
from cogtune.report.pictures import shrink

MOST_ROWS, MOST_COLUMNS = 24, 16
"""More than that would be too small to see."""

_CELL = 240
"""Largest width of a video in pixels."""
_LARGEST = (3840, 4096)
"""Largest width and height of the grid, which players and H.264 levels allow."""
_STRIP = 20
"""Height of a line of text."""
_PAPER, _INK = (24, 26, 30), (235, 237, 240)


def write_grid(
    path: Path, rows: Sequence[tuple[str, Sequence[Path]]], columns: Sequence[str], fps: float, facts: Mapping[str, str]
) -> None:
    """Write the grid, one frame in memory at a time.

    Args:
        rows: a title and a video for each column, all of one size.
        columns: titles.
        facts: metadata of the file.

    Raises:
        CogtuneError: a video cannot be read, or the file not be written.
    """
    rows, columns = [(title, videos[:MOST_COLUMNS]) for title, videos in rows[:MOST_ROWS]], columns[:MOST_COLUMNS]
    info = probe(rows[0][1][0])
    height, width = _cell(info.height, info.width, len(rows), len(columns))
    head = np.concatenate([_text(title, width) for title in columns], axis=1)
    titles = [_text(title, width * len(columns)) for title, _ in rows]
    lengths = [probe(video).num_frames for _, videos in rows for video in videos]

    def frames() -> Iterator[Pixels]:
        readers = [[iter_frames(video, range(min(lengths))) for video in videos] for _, videos in rows]
        for _ in range(min(lengths)):
            lines = [head]
            for title, row in zip(titles, readers, strict=True):
                lines += [title, np.concatenate([shrink(next(one), height, width) for one in row], axis=1)]
            yield np.concatenate(lines)

    write_video(path, frames(), fps, own_files.MARK, facts)


def _cell(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the height and width of each video in the grid, both even; small ones are enlarged."""
    scale = min(
        _CELL / width,
        _LARGEST[0] / (columns * width),
        (_LARGEST[1] - _STRIP * (rows + 1)) / (rows * height),
    )
    return max(2, int(scale * height / 2) * 2), max(2, int(scale * width / 2) * 2)


def _text(words: str, width: int) -> Pixels:
    """Return a line of text, cut off at ``width``: ``uint8 [20, width, 3]``."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, _STRIP), _PAPER)
    ImageDraw.Draw(image).text((4, 3), words.replace("\n", " "), fill=_INK, font=ImageFont.load_default(12))
    return np.asarray(image)
