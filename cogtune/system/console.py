"""All printing: results on stdout, remarks and progress on stderr, less of it without a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

from cogtune.system.errors import CogtuneError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PLAIN_PROGRESS_SECONDS = 10.0
"""Seconds between plain progress lines if stderr is not a terminal."""


@dataclass
class _Settings:
    quiet: bool = False
    remarks: TextIO | None = None
    """Where remarks and progress go; stderr when None."""
    live: Console | None = None
    """The console of the active progress bar; messages are printed above the bar."""


_settings = _Settings()


def configure(*, quiet: bool, remarks: TextIO | None = None) -> None:
    """Set verbosity and the stream for remarks, for the rest of this process."""
    _settings.quiet = quiet
    _settings.remarks = remarks


_QUIET_LIBRARIES = {
    "DEEPSPEED_LOG_LEVEL": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_libraries() -> None:
    """Silence the libraries' own messages, unless the environment asks for them.

    Call it before they are imported. Downloads from the Hub still show their progress.
    """
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    # DeepSpeed 0.19 sets its logger's level at import, whatever the variable says; a filter holds. A child process
    # inherits the variable and not the filter.
    level = logging.getLevelName(os.environ["DEEPSPEED_LOG_LEVEL"].upper())  # a text where there is no such level
    lowest = level if isinstance(level, int) else logging.NOTSET
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= lowest)


class _Stream:
    """Stands in for a stream of text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Lenient(_Stream):
    """A stream that drops text that cannot be written: to a pipe without a reader, a lost terminal, a full disk."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:  # it is closed
            return False


class _Results(_Stream):
    """stdout, for results. A write error is reported as such."""

    def write(self, text: str) -> int:
        with _explain_unwritable_stdout():
            return self._stream.write(text)

    def flush(self) -> None:
        with _explain_unwritable_stdout():
            self._stream.flush()


@contextlib.contextmanager
def _explain_unwritable_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        raise
    except OSError as error:
        sys.stdout = None  # otherwise Python tries again at exit and reports the failure
        raise CogtuneError(
            f"cannot write the results to stdout: {error.strerror}",
            "the work is done and its files are complete; to see the results, redirect stdout elsewhere",
        ) from error


def lenient(stream: TextIO) -> TextIO:
    """Wrap ``stream`` for remarks, so that a failure to write one never stops the work."""
    return stream if isinstance(stream, _Lenient) else cast(TextIO, _Lenient(stream))


def open_streams() -> None:
    """Ensure that stdin, stdout and stderr exist, and that a failure to write a remark does not stop the program.

    The next file to be opened would take the descriptor of a closed stream, and everything printed would go to that
    file. A closed stream is therefore replaced by one that cannot be used. Printing results to it is an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY if number else os.O_WRONLY), True)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    sys.stderr = lenient(sys.stderr)
    if not isinstance(sys.stdout, _Results):
        sys.stdout = cast(TextIO, _Results(sys.stdout))


def _remarks() -> TextIO:
    return _settings.remarks or sys.stderr


def _console(stream: TextIO) -> Console:
    from rich.console import Console, ConsoleDimensions

    class Terminal(Console):
        """A console as wide as its own stream's terminal, whatever stdin, stdout and stderr are."""

        @property
        def size(self) -> ConsoleDimensions:
            try:
                wide, high = os.get_terminal_size(self.file.fileno())
            except (OSError, ValueError):
                return super().size
            return ConsoleDimensions(int(os.environ.get("COLUMNS") or wide or 80), high or 25)

        @size.setter
        def size(self, new_size: tuple[int, int]) -> None:
            self._width, self._height = new_size

    if stream.isatty():
        return Terminal(file=stream, highlight=False, soft_wrap=True)
    return Console(file=stream, highlight=False, soft_wrap=True, width=200)  # a file has no width: no wrapping


def is_quiet() -> bool:
    """Return whether remarks are left out."""
    return _settings.quiet


def say(message: str) -> None:
    """Print a result line on stdout."""
    print(_in_characters_of(sys.stdout, printable(message)), flush=True)


def emit(value: Any) -> None:
    """Print a JSON result on stdout, for programs."""
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=plain).translate(_IN_JSON)
    print(_in_characters_of(sys.stdout, text), flush=True)


def _in_characters_of(stream: TextIO, text: str) -> str:
    """Escape what ``stream`` cannot encode: a lone surrogate from a file name, or `é` in ASCII."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def note(message: str) -> None:
    """Print a remark on stderr: what is being done or has been done."""
    if _settings.live is not None:
        _settings.live.print(escape(message))
    elif not _settings.quiet:
        print(printable(message), file=_remarks(), flush=True)


def warn(message: str) -> None:
    """Print a warning on stderr, even when quiet."""
    _console(_remarks()).print(f"[yellow]warning:[/] {escape(message)}")


def error(problem: CogtuneError) -> None:
    """Print an error on stderr: what is wrong, its details, what to do."""
    console = _console(_remarks())
    console.print(f"[bold red]error:[/] {escape(problem.message)}")
    for detail in problem.details:
        console.print(f"  - {escape(detail)}")
    if problem.hint:
        console.print(f"[dim]hint:[/] {escape(problem.hint)}")


def escape(text: str) -> str:
    """Escape ``text`` for display: neither rich's markup nor control characters have an effect."""
    from rich.markup import escape as rich_escape

    return rich_escape(printable(text))


_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that change the direction of the text around them: with them, a name looks like another."""

_CODES = (*(code for code in range(32) if chr(code) not in "\t\n"), *range(127, 160), 0x2028, 0x2029, *_BIDI)
_COMMANDS = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CODES}
_IN_JSON = {code: f"\\u{code:04x}" for code in _CODES if code >= 32}  # JSON itself spells out the others


def printable(text: str) -> str:
    """Escape what a terminal would obey or cannot show, since a file name may contain anything."""
    return text.translate(_COMMANDS).encode(errors="backslashreplace").decode()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; without a terminal, print tab-separated lines with a header."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            say("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    from rich import box
    from rich.table import Table

    grid = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in columns:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    show(grid)


def show(renderable: RenderableType) -> None:
    """Print anything rich can draw on stdout."""
    from rich.console import Console

    Console(file=sys.stdout, highlight=False).print(renderable)


class Progress:
    """Progress through a task; created by :func:`progress`."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = self.told = time.monotonic()

    def advance(self, count: int = 1, status: str = "") -> None:
        """Advance by ``count``, and show ``status`` after the bar."""
        self.done += count
        self._tell(status)

    def move_to(self, done: int, total: int) -> None:
        """Set ``done`` of ``total``, for work whose total is not known at the start."""
        self.done, self.total = done, total
        self._tell("")

    def _tell(self, status: str) -> None:
        now = time.monotonic()
        if now - self.told >= PLAIN_PROGRESS_SECONDS:
            self.told = now
            left = (now - self.began) / max(1, self.done) * (self.total - self.done)
            minutes, seconds = divmod(round(left), 60)
            about = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
            said = (f"{self.done}/{self.total}", f"about {about} left" if self.done else "", status)
            note(f"{self.what}: {', '.join(part for part in said if part)}")


class _Bar(Progress):
    def __init__(self, what: str, total: int, draw: Any) -> None:
        super().__init__(what, total)
        self.draw = draw
        self.task = draw.add_task(what, total=total, status="")

    def _tell(self, status: str) -> None:
        self.draw.update(self.task, completed=self.done, total=self.total, status=escape(status))


class Dashboard:
    """Live display of a run, created by :func:`dashboard`; without a terminal, an occasional line."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self.what, self.total, self.done = what, total, done
        self._told: float | None = None

    def advance(self, figures: Mapping[str, str], *, seconds_left: float) -> None:
        """Advance by one, and show ``figures`` by name and the estimated time left."""
        self.done += 1
        now = time.monotonic()
        if self._told is None or now - self._told >= PLAIN_PROGRESS_SECONDS or self.done == self.total:
            self._told = now
            told = "  ".join(f"{name} {value}" for name, value in figures.items())
            note(f"{self.what}: {self.done}/{self.total}  {told}  {span(seconds_left)} left")

    def doing(self, text: str) -> None:
        """Show the current activity until the next step; only on a terminal."""


class _LiveDashboard(Dashboard):
    """A bar and, below it, the figures in as many columns as fit the screen."""

    def __init__(self, what: str, total: int, done: int) -> None:
        super().__init__(what, total, done)
        self._figures: Mapping[str, str] = {}
        self._status = ""

    def advance(self, figures: Mapping[str, str], *, seconds_left: float) -> None:
        self.done += 1
        self._figures, self._status = figures, f"{span(seconds_left)} left"

    def doing(self, text: str) -> None:
        self._status = text

    def __rich__(self) -> RenderableType:
        from rich.columns import Columns
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            head.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=self.total, completed=self.done)
        head.add_row(self.what, bar, f"{self.done}/{self.total}", Text(self._status, "cyan"))
        cells = [Text.assemble((name, "dim"), " ", value) for name, value in self._figures.items()]
        return Group(head, Columns(cells, padding=(0, 3))) if cells else head


def span(seconds: float) -> str:
    """Format a duration: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextlib.contextmanager
def dashboard(what: str, total: int, *, done: int = 0) -> Iterator[Dashboard]:
    """Show the state of a run of ``total`` steps: a live display on a terminal, an occasional plain line elsewhere."""
    if _settings.quiet or not _remarks().isatty():
        yield Dashboard(what, total, done)
        return
    from rich.live import Live

    shown = _LiveDashboard(what, total, done)
    with Live(shown, console=_console(_remarks()), transient=True, refresh_per_second=4) as live:
        _settings.live = live.console
        try:
            yield shown
        finally:
            _settings.live = None


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Progress]:
    """Show progress through ``total`` items: a live bar on a terminal, an occasional plain line elsewhere."""
    if _settings.quiet or not _remarks().isatty():
        yield Progress(what, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with RichProgress(*columns, console=_console(_remarks()), transient=True) as draw:
        _settings.live = draw.console
        try:
            yield _Bar(what, total, draw)
        finally:
            _settings.live = None
