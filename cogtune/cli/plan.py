"""``cogtune plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from cogtune.cli.options import ConfigFile, Fit, Flags, Json, PresetName, with_config_flags
from cogtune.config.run_config import RunConfig
from cogtune.system import console


@with_config_flags(*RunConfig.model_fields)
def plan(
    flags: Flags,
    preset: PresetName = None,
    config: ConfigFile = None,
    fit: Fit = False,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            help="Number of clips. [default: as many as the dataset has, or 100 without one]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate what a run needs, without downloading anything: GPU and host memory, disk, time, the launch command."""
    from cogtune.config.resolving import resolve
    from cogtune.models.locate import spec_of
    from cogtune.planning.estimate import check_arrangement
    from cogtune.planning.fit import fitted, local_hardware
    from cogtune.planning.free_memory import with_free_memory
    from cogtune.planning.host_memory import with_state
    from cogtune.planning.summary import estimate_run
    from cogtune.run.plan import advice, check_config

    resolved = resolve(preset_name=preset, file=config, flags=flags)
    spec, machine = spec_of(resolved.config.model), local_hardware()
    if resolved.config.init_lora is not None:
        from cogtune.modeling.lora_files import with_init_lora

        resolved = with_init_lora(resolved, spec, console.warn)
    if fit:
        resolved = fitted(resolved, spec, machine)
    check_config(resolved.config, spec)
    resolved = with_state(with_free_memory(resolved, spec, machine), spec)
    check_arrangement(resolved.config, spec, machine.cards[0].name if machine.cards else "")
    for told in advice(resolved.config, spec):
        console.note(told)
    found = estimate_run(resolved.config.with_absolute_paths(), spec, machine, () if samples is None else (samples,))
    if as_json:
        console.emit(found.to_dict())
    else:
        console.table("", ("what", "how much"), found.rows())
