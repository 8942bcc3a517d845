"""``cogtune presets``."""

from __future__ import annotations

from typing import Annotated

import typer

from cogtune import console
from cogtune.cli.options import Json


def presets(
    name: Annotated[str | None, typer.Argument(help="One preset, to see all its values.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the presets, or show every value of one."""
    from cogtune.config import preset_values, resolve
    from cogtune.presets import PRESETS

    if name is not None:
        preset_values(name)  # says where the names are listed, if there is none of this name
        resolved = resolve(preset_name=name)
        values = resolved.config.to_dict()
        if as_json:
            console.emit(values)
        else:
            shown = [(key, str(value), resolved.provenance[key]) for key, value in values.items()]
            console.table("", ("key", "value", "from"), shown)
        return
    rows = [
        (
            row.name,
            f"{row.gpus} x {row.card}" if row.gpus > 1 else row.card,
            row.model,
            row.type,
            row.strategy,
            row.precision,
            str(row.size),
            f"{row.promised_gb:g} GB" if row.promised_gb is not None else "",
        )
        for row in PRESETS.values()
    ]
    columns = ("preset", "hardware", "model", "type", "strategy", "precision", "size", "guides' VRAM")
    if as_json:
        console.emit([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        short = (0, 5, 6, 7)  # the name says the rest, and a terminal of 80 columns has room for these
        console.table("", [columns[i] for i in short], [[row[i] for i in short] for row in rows])
