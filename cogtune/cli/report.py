"""``cogtune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogtune.system import console


def report(
    output: Annotated[Path, typer.Argument(help="Run folder.")] = Path("out"),
) -> None:
    """Write OUTPUT/report.html: curves, sample videos, and the source of every setting."""
    from cogtune.report.run import write_run_report

    console.say(str(write_run_report(output)))
