"""The docs say what the program does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from cogtune.config.choices import DataFormat
from cogtune.config.optimizers import OPTIMIZERS
from cogtune.config.presets import PRESETS
from cogtune.data.findings import FINDINGS
from cogtune.planning.measurements import recorded
from tools import vram_page as vram
from tools.commands_page import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
