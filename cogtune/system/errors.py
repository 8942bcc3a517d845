"""Errors as the user sees them: what is wrong, what to do, and an exit code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from signal import SIGINT

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CogtuneError(Exception):
    """A failure that the user can understand and act on.

    Args:
        message: one line: what is wrong, naming the file, line or value.
        hint: one line: what to do about it; empty if the message is enough.
        details: if several things of one kind are wrong, all of them, one line each.
        exit_code: the process's exit status, 1 unless the command line itself was wrong (2).
    """

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        details: Sequence[str] = (),
        exit_code: int = EXIT_FAILURE,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)
        self.exit_code = exit_code

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {detail}" for detail in self.details)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class UsageError(CogtuneError):
    """The command line or a configuration is wrong; exit code 2."""

    def __init__(self, message: str, hint: str = "", *, details: Sequence[str] = ()) -> None:
        super().__init__(message, hint, details=details, exit_code=EXIT_USAGE)


class StoppedError(CogtuneError):
    """The work was stopped by a signal, as requested.

    Args:
        signal: its number.
    """

    def __init__(self, hint: str, *, signal: int) -> None:
        code = EXIT_INTERRUPTED if signal == SIGINT else 128 + signal
        super().__init__("stopped before the end", hint, exit_code=code)


_ADVICE = re.compile(
    r"weights_only|trust_remote_code|allow_pickle|safe_globals|still be loaded|arbitrary code|trust", re.I
)
"""Advice in library messages to disable a safeguard, which would run code from a file."""

_MOST_CHARACTERS = 400


def said_by(error: BaseException) -> str:
    """Return the first line of a library's error message, without advice to disable a safeguard."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sentences = re.split(r"(?<=[.!?:;])\s+", lines[0]) if lines else []
    said = " ".join(sentence for sentence in sentences if not _ADVICE.search(sentence)).rstrip(" :;")
    return (said or type(error).__name__)[:_MOST_CHARACTERS]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` with the known word nearest to ``word``, or nothing if none is near."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f"; did you mean '{lowered[near[0]]}'?" if near else ""


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return ``"1 sample"``, ``"2 samples"``: a count with its noun; ``plural`` for a noun that takes no ``s``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"
