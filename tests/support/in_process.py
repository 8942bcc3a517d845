"""The command line in the test's own process, without the seconds that starting one takes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cogtune.cli import _status
from cogtune.system import console


@dataclass(frozen=True)
class Ran:
    """What a command gave."""

    status: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> Ran:
    """Run a command; its status and what it printed."""
    capsys.readouterr()
    got = _status([str(word) for word in words], False)
    console.configure(quiet=False)
    printed = capsys.readouterr()
    assert got == status, f"{words}: status {got}\n{printed.out}\n{printed.err}"
    return Ran(got, printed.out, printed.err)
