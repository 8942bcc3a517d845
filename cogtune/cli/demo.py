"""``cogtune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogtune.system import console


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder to work in. An earlier demo there is replaced.")] = Path(
        "cogtune-demo"
    ),
) -> None:
    """Try everything in a minute, on any machine: draw clips, check and encode them, train a LoRA, sample a video."""
    from cogtune.commands.demo import run

    for line in run(folder):
        console.say(line)
