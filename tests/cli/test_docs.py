"""The docs say what the program does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.main import get_command

from cogtune.cli.app import app
from cogtune.config.choices import DataFormat
from cogtune.config.optimizers import OPTIMIZERS
from cogtune.config.presets import PRESETS
from cogtune.data.findings import FINDINGS
from cogtune.planning.measurements import recorded
from tools import vram_page as vram
from tools.commands_page import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<body>.*?)^ *```", re.M | re.S)
OWN_PRESETS = {"mine"}
"""What pages call a preset of the reader's own."""
CLI: Any = get_command(app)
INLINE = re.compile(r"`(cogtune [^`]+)`")


def test_the_command_reference_is_not_stale() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == reference(), "run `make docs`"


def test_the_table_of_measurements_is_not_stale() -> None:
    assert (ROOT / "docs" / "vram.md").read_text() == vram.page(recorded()), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    lost = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    known = set(re.findall(r"--[a-z][a-z0-9-]*", reference())) | {"--help", "--quiet", "--version"}
    named = {
        flag
        for line in re.findall(r"cogtune [^\n`]*", page.read_text())
        for flag in re.findall(r"--[a-z][a-z0-9-]*", line)
    }
    assert named - known == set()


def test_every_preset_optimizer_layout_and_finding_has_its_place() -> None:
    presets = (ROOT / "docs" / "presets.md").read_text()
    assert [name for name in PRESETS if f"`{name}`" not in presets] == []
    training = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in OPTIMIZERS if f"| `{name}` |" not in training] == []
    findings = (ROOT / "docs" / "dataset-format.md").read_text()
    assert [code for code in FINDINGS if f"| `{code}` |" not in findings] == []
    assert [name for name in get_args(DataFormat) if f"`{name}`" not in findings] == []


def test_the_architecture_and_the_recipes_name_what_is_there() -> None:
    """Each path and dotted name in backquotes on these pages exists in the package."""
    lost = []
    for page in (ROOT / "docs" / "architecture.md", *(ROOT / "docs" / "contributing").glob("*.md")):
        for name in re.findall(r"`((?:cogtune/)?[a-z_]+(?:/[a-z_]+)*/?(?:\.py)?)`", page.read_text()):
            path = name.removeprefix("cogtune/")
            if "/" in name and not (ROOT / "cogtune" / path).exists() and not (ROOT / name).exists():
                lost.append(f"{page.name}: {name}")
        for dotted in re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_]+)`", page.read_text()):
            package, *rest = dotted.split(".")
            if not (ROOT / "cogtune" / package).is_dir():
                continue
            module = ROOT / "cogtune" / package
            while rest and ((module / rest[0]).is_dir() or (module / f"{rest[0]}.py").is_file()):
                module = module / rest.pop(0)
            text = module.with_suffix(".py").read_text() if module.with_suffix(".py").is_file() else ""
            if len(rest) > 1 or (rest and not re.search(rf"^(?:class|def) {rest[0]}\b", text, re.MULTILINE)):
                lost.append(f"{page.name}: {dotted}")
    assert lost == []


def test_the_container_gets_the_files_that_it_copies() -> None:
    copied = [
        words.split()[:-1] for words in re.findall(r"^COPY (.+)$", (ROOT / "tools" / "Dockerfile").read_text(), re.M)
    ]
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for names in copied for name in names} == sent
    assert [name for name in sent if not (ROOT / name).exists()] == []


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
    at = CLI
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


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_program_takes_every_command_of_a_page(page: Path) -> None:
    wrong = [(line, problem) for line, whole in commands(page) if (problem := problem_of(line, whole=whole))]
    assert wrong == []


def test_there_are_commands_and_a_wrong_one_is_noticed() -> None:
    found = [line for page in ALL_PAGES for line, whole in commands(page) if whole]
    assert len(found) > 60
    assert "--stepss" in problem_of("cogtune train --stepss 3", whole=True)
    assert problem_of("cogtune train --stepss", whole=False) == "--stepss"
    assert problem_of("cogtune trian", whole=True) == "no command trian"
    assert problem_of("cogtune plan --preset 4090", whole=True) == "no preset 4090"
