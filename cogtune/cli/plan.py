"""``cogtune plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from cogtune import console
from cogtune.cli.options import ConfigFile, Fit, Flags, Json, PresetName, with_config_flags
from cogtune.config import RunConfig


@with_config_flags(*RunConfig.model_fields)
def plan(
    flags: Flags,
    preset: PresetName = None,
    config: ConfigFile = None,
    fit: Fit = False,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=1, help="Clips in the dataset. [default: those in it, else 100]", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a run will take, before anything is downloaded: memory of GPU and host, disk, time, the command."""
    from cogtune.estimate import check_arrangement
    from cogtune.fit import fitted, this_machine
    from cogtune.modeling.locate import spec_of
    from cogtune.plan import advice, check
    from cogtune.planning import outlook
    from cogtune.resolving import resolve

    resolved = resolve(preset_name=preset, file=config, flags=flags)
    spec, machine = spec_of(resolved.config.model), this_machine()
    if resolved.config.init_lora is not None:
        from cogtune.modeling.lora_files import with_init_lora

        resolved = with_init_lora(resolved, spec, console.warn)
    if fit:
        resolved = fitted(resolved, spec, machine)
    check(resolved.config, spec)
    check_arrangement(resolved.config, spec, machine.cards[0].name if machine.cards else "")
    for told in advice(resolved.config, spec):
        console.note(told)
    found = outlook(resolved.config.anchored(), spec, machine, () if samples is None else (samples,))
    if as_json:
        console.emit(found.to_dict())
    else:
        console.table("", ("what", "how much"), found.rows())
