"""``cogtune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogtune.system import console


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to work; a demo that is there is made anew.")] = Path(
        "cogtune-demo"
    ),
) -> None:
    """The whole road in a minute, on any machine: draw clips, check, encode, train a LoRA, sample a video."""
    from cogtune.commands.demo import run

    for line in run(folder):
        console.say(line)
