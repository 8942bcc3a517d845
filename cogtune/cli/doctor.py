"""``cogtune doctor``."""

from __future__ import annotations

import typer

from cogtune.cli.options import Json
from cogtune.system import console


def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, GPUs, memory, disk, link, kernels, compilers, decoders, login, presets.

    Each line is good, poor or missing, with what to do. Exits with 1 if something is missing that training needs.
    """
    from cogtune.commands.doctor import examine, look

    console.note("looking; a few seconds")
    report = examine(look())
    if as_json:
        console.emit(report.to_json())
    else:
        rows = [(line.state, line.name, line.found, line.advice) for line in report.lines]
        console.table("", ("", "what", "found", "what to do"), rows)
    raise typer.Exit(0 if report.ok else 1)
