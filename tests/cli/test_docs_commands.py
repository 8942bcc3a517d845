"""The commands of README and docs are ones that the program takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cogtune.cli.app import app
from cogtune.config.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<body>.*?)^ *```", re.M | re.S)
OWN_PRESETS = {"mine"}
"""What pages call a preset of the reader's own."""
INLINE = re.compile(r"`(cogtune [^`]+)`")


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Every command of a page, and whether it stands in a block, where it is to be whole."""
    text = page.read_text()
    for block in FENCE.finditer(text):
        if block["language"] in ("", "sh", "bash", "console"):
            body = block["body"].replace("\\\n", " ")
            for line in body.splitlines():
                if (words := line.strip().removeprefix("$ ")).startswith("cogtune "):
                    yield words, True
    for match in INLINE.finditer(FENCE.sub("", text)):
        yield " ".join(match[1].split()), False


def problem_of(line: str, *, whole: bool) -> str:
    """What the program would not take of a command; empty if it takes it."""
    at: Any = get_command(app)
    words = shlex.split(line, comments=True)[1:]
    name = "cogtune"
    while words and hasattr(at, "commands"):
        if words[0].startswith("-") or words[0].isupper():
            return ""
        name, *words = words
        if name not in at.commands:
            return f"no command {name}"
        at = at.commands[name]
    if not whole:  # values and arguments may be left out
        flags = {flag for option in at.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
        return ", ".join(word for word in words if word.startswith("--") and word.partition("=")[0] not in flags)
    if "--help" in words:
        return ""
    try:
        preset = at.make_context(name, words).params.get("preset")
    except Exception as error:  # typer's own copy of click's UsageError
        return f"{type(error).__name__}: {error}"
    known = preset is None or preset in PRESETS or preset.endswith(".yaml") or preset in OWN_PRESETS
    return "" if known else f"no preset {preset}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_program_takes_every_command_of_a_page(page: Path) -> None:
    wrong = [(line, problem) for line, whole in commands(page) if (problem := problem_of(line, whole=whole))]
    assert wrong == []


def test_there_are_commands_and_a_wrong_one_is_noticed() -> None:
    found = [line for page in PAGES for line, whole in commands(page) if whole]
    assert len(found) > 60
    assert "--stepss" in problem_of("cogtune train --stepss 3", whole=True)
    assert problem_of("cogtune train --stepss", whole=False) == "--stepss"
    assert problem_of("cogtune trian", whole=True) == "no command trian"
    assert problem_of("cogtune plan --preset 4090", whole=True) == "no preset 4090"
