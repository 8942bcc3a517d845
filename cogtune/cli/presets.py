"""``cogtune presets``."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated

import typer

from cogtune.cli.options import Json
from cogtune.system import console
from cogtune.system.errors import CogtuneError, UsageError


def presets(
    name: Annotated[str | None, typer.Argument(help="Show all values of this preset.", show_default=False)] = None,
    here: Annotated[
        bool, typer.Option("--here", help="List those that fit this machine, with an estimate of what each takes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List all presets or those that fit this machine, or show every value of one."""
    from cogtune.config.resolving import preset_values, resolve

    if name is not None and here:
        raise UsageError("--here lists presets", f"leave out {name}, or run `cogtune plan --preset {name}`")
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
    columns, rows = _listing_here() if here else listing()
    if as_json:
        console.emit([dict(zip(columns, row, strict=True)) for row in rows])
        return
    wide = not sys.stdout.isatty() or shutil.get_terminal_size().columns >= _WIDE
    short = _SHORT_HERE if here else _SHORT
    kept = range(len(columns)) if wide else short
    console.table("", [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


_WIDE = 150
_SHORT, _SHORT_HERE = (0, 5, 7, 8), (0, 5, 6, 7)
"""The columns that fit an 80-column terminal."""

Rows = list[tuple[str, ...]]


def _listing_here() -> tuple[tuple[str, ...], Rows]:
    """Build the columns and rows of the presets that fit this machine; say what the machine is."""
    from cogtune.config.resolving import resolve
    from cogtune.models.checkpoint_configs import published_spec
    from cogtune.models.variants import built_in, published
    from cogtune.planning.estimate import GIB
    from cogtune.planning.fit import GB, estimate_on, local_hardware
    from cogtune.planning.free_memory import with_free_memory

    machine = local_hardware()
    console.note(f"this machine: {machine}, {machine.host / GIB:.0f} GiB of host memory")
    columns, rows = listing()
    found: Rows = []
    for row in rows:
        resolved = resolve(preset_name=row[0])
        config, variant = resolved.config, published(resolved.config.model)
        if variant is None:
            console.note(f"{row[0]} is left out: `cogtune plan --preset {row[0]}` reads the files of {config.model}")
        elif built_in(config.model) is not None:
            found.append((row[0], *row[2:6], "", "", ""))
        else:
            try:
                needs = estimate_on(config, machine)
                if needs is not None:
                    now = with_free_memory(resolved, published_spec(variant), machine, tell=lambda _: None).config
                    needs = estimate_on(now, machine) or needs
            except CogtuneError as error:
                console.warn(f"{row[0]} is left out: " + "; ".join((error.message, *error.details)))
                continue
            if needs is not None:
                gpu = f"{needs.memory.card / GB:.1f} GB" if machine.cards else ""
                step = f"{needs.seconds:.2f} s" if needs.seconds is not None else ""
                found.append((row[0], *row[2:6], gpu, f"{needs.host / GIB:.0f} GiB", step))
    if all(not row[6] for row in found):
        console.note("no preset of a published model fits; `cogtune plan --preset NAME` says what one takes")
    return ("preset", *columns[2:6], "GPU memory", "host memory", "step"), found


def listing() -> tuple[tuple[str, ...], Rows]:
    """Build the columns and rows of the list, the user's own presets last."""
    from cogtune.config.presets import PRESETS
    from cogtune.config.resolving import resolve, user_presets
    from cogtune.planning.measurements import of_preset, recorded

    columns = ("preset", "hardware", "model", "type", "strategy", "precision", "size", "guides' VRAM", "measured VRAM")
    rows: Rows = []
    for row in PRESETS.values():
        measured = of_preset(row.name, recorded())
        rows.append(
            (
                row.name,
                f"{row.gpus} x {row.card}" if row.gpus > 1 else row.card,
                row.model,
                row.type,
                row.strategy,
                row.precision,
                str(row.size),
                f"{row.promised_gb:g} GB" if row.promised_gb is not None else "",
                f"{measured.whole_card} ({measured.place})" if measured and measured.whole_card else "",
            )
        )
    for name, path in user_presets().items():
        if name in PRESETS:
            console.warn(f"{path} is ignored: a built-in preset has the same name")
            continue
        try:
            config = resolve(preset_name=name).config
        except CogtuneError as error:
            console.warn("; ".join((error.message, *error.details)) + f": {path}")
            continue
        hardware = f"{config.num_processes} GPUs" if config.num_processes > 1 else "your own"
        rows.append(
            (name, hardware, config.model, config.type, config.strategy, config.precision, config.size or "", "", "")
        )
    return columns, rows
