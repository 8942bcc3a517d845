"""``cogtune random-model``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cogtune.models.variants import VARIANTS
from cogtune.system import console


def random_model(
    variant: Annotated[str, typer.Argument(help=f"{', '.join([*VARIANTS][:-1])} or {[*VARIANTS][-1]}.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write to, which must not exist.")],
    scale: Annotated[
        Literal["tiny", "full"],
        typer.Option("--scale", help="tiny: a few megabytes; full: the published dimensions."),
    ] = "tiny",
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 0,
) -> None:
    """Write a complete model with random weights, for trials, tests and measurements without a download."""
    from cogtune.models.variants import variant as find
    from cogtune.system.errors import UsageError

    row = find(variant)
    if folder.exists():
        raise UsageError(f"{folder} already exists", "choose another folder")
    from cogtune.modeling.devices import best_device
    from cogtune.modeling.random_weights import write_pipeline

    device = best_device() if scale == "full" else "cpu"
    console.say(str(write_pipeline(row, folder, scale=scale, seed=seed, device=device)))
