"""Terminal recordings for the documentation, as SVG: ``python -m tools.record_terminal [NAME]...``.

Each runs a real command under a pseudo-terminal, in an empty folder with six drawn clips and a tiny model, and draws
the screen that it leaves, or the first one that shows what it should, to ``docs/images/NAME.svg``.
"""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cogtune.data.synthetic import draw_dataset

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH, HEIGHT = 100, 60


@dataclass(frozen=True)
class Recording:
    """A command, as its words after ``cogtune``.

    Args:
        until: pattern of the text of a screen; the first that contains it is drawn. Empty for the last one.
        status: the command's exit code.
    """

    words: str
    until: str = ""
    status: int = 0


RECORDINGS = {
    "validate": Recording("dataset validate clips --preset cpu-lora-tiny --fps 4", status=1),
    "plan": Recording("plan --preset 8gb-lora-5b"),
    "train": Recording("train --preset cpu-lora-tiny --data clips --steps 60 --eval-every 20", until=r"4[2-9]/60"),
}

_TOKEN = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b\].*?(?:\x1b\\|\x07)|\x1b[^\[\]]|.", re.DOTALL)
"""A control sequence (ECMA-48), a command of the operating system such as a link, or one character."""


@dataclass
class Screen:
    """As much of a terminal as rich makes use of: colours, the cursor up and to the left, and erasing."""

    width: int = WIDTH
    rows: list[list[tuple[str, str]]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    style: str = ""
    """The sequences that set the current colours."""

    def write(self, text: str) -> None:
        """Show what a program wrote."""
        for found in _TOKEN.finditer(text):
            if found[2] is not None:
                self._control(found[1], found[2])
            elif found[0] == "\n":
                self._go(self.row + 1)
            elif found[0] == "\r":
                self.column = 0
            elif found[0].isprintable():
                self._put(found[0])

    def _control(self, numbers: str, kind: str) -> None:
        number = int(numbers) if numbers.isdigit() else 0
        if kind == "m":
            self.style = "" if number == 0 and numbers in ("", "0") else f"{self.style}\x1b[{numbers}m"
        elif kind in "AB":
            self._go(self.row + (max(1, number) if kind == "B" else -max(1, number)))
        elif kind == "G":
            self.column = max(0, number - 1)
        elif kind == "K":
            del self.rows[self.row][0 if number == 2 else self.column :]

    def _go(self, row: int) -> None:
        self.row = max(0, row)
        while len(self.rows) <= self.row:
            self.rows.append([])

    def _put(self, character: str) -> None:
        if self.column == self.width:
            self.column = 0
            self._go(self.row + 1)
        cells = self.rows[self.row]
        cells += [(" ", "")] * (self.column + 1 - len(cells))
        cells[self.column] = (character, self.style)
        self.column += 1

    def text(self) -> str:
        """Return the characters on the screen."""
        return "\n".join("".join(character for character, _ in cells).rstrip() for cells in self.rows)

    def lines(self) -> list[Text]:
        """Return the lines with their colours, without empty ones at the end."""
        drawn = [Text.from_ansi("".join(f"\x1b[0m{style}{one}" for one, style in cells)) for cells in self.rows]
        while drawn and not drawn[-1].plain.strip():
            drawn.pop()
        return drawn


def record(recording: Recording, folder: Path) -> list[Text]:
    """Run a command in ``folder`` and return the screen.

    Raises:
        RuntimeError: it ended otherwise, or never showed what it should.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    words = [sys.executable, "-m", "cogtune", *recording.words.split()]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    running = subprocess.Popen(
        words, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm-256color"}
    )
    os.close(theirs)
    screen, decoder, drawn = Screen(), codecs.getincrementaldecoder("utf-8")(), list[Text]()
    while data := _read(ours):
        screen.write(decoder.decode(data).replace(f"{folder}{os.sep}", ""))
        if recording.until and not drawn and re.search(recording.until, screen.text()):
            drawn = screen.lines()
    os.close(ours)
    if (status := running.wait()) != recording.status:
        raise RuntimeError(f"cogtune {recording.words}: status {status}\n{screen.text()}")
    if recording.until and not drawn:
        raise RuntimeError(f"cogtune {recording.words} never showed {recording.until!r}:\n{screen.text()}")
    return drawn or screen.lines()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the program has ended
        return b""


def as_svg(command: str, lines: list[Text], name: str) -> str:
    """Return a screen as SVG, below the command; it loads no font from elsewhere."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), command))
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")
    svg = console.export_svg(title="cogtune", unique_id=name)
    return re.sub(r"@font-face \{[^}]*\}\s*", "", svg).replace("Fira Code", "ui-monospace, Menlo, Consolas")


@contextmanager
def example() -> Iterator[Path]:
    """Make a folder with six drawn clips."""
    with tempfile.TemporaryDirectory() as folder:
        clips = draw_dataset(Path(folder).resolve() / "clips")
        yield clips.parent


def main(names: list[str]) -> None:
    """Draw the recordings with these names, or all."""
    IMAGES.mkdir(exist_ok=True)
    for name in names or RECORDINGS:
        with example() as folder:
            if name == "validate":
                clip = sorted(folder.glob("clips/videos/*.mp4"))[1]
                clip.write_bytes(clip.read_bytes()[:2000])  # as an unfinished download leaves it
            recording = RECORDINGS[name]
            lines = record(recording, folder)
        (IMAGES / f"{name}.svg").write_text(as_svg(f"cogtune {recording.words}", lines, name), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
