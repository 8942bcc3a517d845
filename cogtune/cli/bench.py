"""``cogtune bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cogtune.cli.options import ConfigFile, Flags, PresetName, with_config_flags
from cogtune.config.run_config import RunConfig, tagged
from cogtune.system import console

if TYPE_CHECKING:
    from cogtune.planning.measurements import Measurement


def _measured_fields() -> list[str]:
    """List the fields that a step's time or memory may depend on."""
    untimed = tagged("untimed")
    return [name for name in RunConfig.model_fields if name not in untimed]


def preset_and_changes(file: Path) -> tuple[str | None, dict[str, Any]]:
    """Return a config file's preset, and the keys it sets that affect a step's time or memory."""
    from cogtune.config.resolving import read_mapping

    values = read_mapping(file)
    kept = {key: values[key] for key in _measured_fields() if values.get(key) not in (None, [])}
    return values.get("preset"), kept


@with_config_flags(*_measured_fields())
def bench(
    flags: Flags,
    preset: PresetName = None,
    config: ConfigFile = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Untimed steps before them.")] = 3,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            help="Also measure another preset of the same model, or plain, the recipe of the public CogVideoX "
            "fine-tuning guides: base in fp32, eager, full checkpointing.",
            metavar="plain|PRESET",
            show_default=False,
        ),
    ] = None,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone",
            help="Measure one process of a zero2 preset on a single GPU, without the others.",
            show_default=False,
        ),
    ] = False,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            help="Keep the random model and samples in this folder and reuse them next time.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            help="Also trace one step with PyTorch's profiler: a file for Perfetto or chrome://tracing, such as "
            "step.json, with a summary next to it.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the measurements to this file, or to stdout with -.", show_default=False),
    ] = None,
) -> None:
    """Measure the memory and time of a preset's real training step, with random weights and no download."""
    from cogtune.bench.run import BenchRequest, command_of
    from cogtune.bench.run import bench as measure
    from cogtune.config.resolving import resolve

    more = ["--steps", str(steps), "--warmup", str(warmup), *(["--compare", compare] if compare else [])]
    more += ["--alone"] if alone else []
    if config is not None:
        more = ["--config", str(config), *more]
    resolved = resolve(preset_name=preset, file=config, flags=flags)
    against = None if compare in (None, "plain") else (str(compare), resolve(preset_name=compare))
    started_from, set_there = preset_and_changes(config) if config is not None else (None, {})
    request = BenchRequest(
        resolved=resolved,
        preset=preset or started_from,
        changes={**set_there, **flags},
        steps=steps,
        warmup=warmup,
        alone=alone,
        keep=keep,
        command=command_of(preset, flags, more),
        against=against,
        trace=trace,
    )
    done: list[Measurement] = []
    try:
        for row in measure(request, ("preset", "plain") if compare == "plain" else ("preset",)):
            done.append(row)  # shown even if the next one is stopped
    finally:
        if done:
            _show(done, json_file, None if alone or resolved.config.epochs else resolved.config.steps)


def _show(done: list[Measurement], json_file: Path | None, run: int | None) -> None:
    from cogtune.system.json_files import write_json

    if json_file == Path("-"):
        console.emit([row.to_dict() for row in done])
        return
    if json_file is not None:
        write_json(json_file, [row.to_dict() for row in done])
    columns, rows = table(done, run)
    console.table("", columns, rows)


def table(done: list[Measurement], run: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Build the table's columns and rows: a figure, its value for each recipe, and the ratio of the two.

    Args:
        run: steps of the planned run, whose total time is estimated.
    """
    from cogtune.config.presets import PRESETS
    from cogtune.planning.measurements import GB, GIB

    on_cpu = done[0].gpu == "cpu"
    whole = "whole GPU without NCCL" if done[0].alone else "whole GPU"
    figures: list[tuple[str, list[float | None], str]] = [
        ("seconds a step (median)", [row.step_s for row in done], ".3f"),
        ("fastest step, s", [row.step_s_range[0] if row.step_s_range else None for row in done], ".3f"),
        ("slowest step, s", [row.step_s_range[1] if row.step_s_range else None for row in done], ".3f"),
        ("tokens/s, all GPUs", [row.tokens_per_s for row in done], ",.0f"),
        (f"{whole}, GB of 10^9", [row.card_gb for row in done], ".2f"),
        (f"{whole}, GiB", [row.card_gb * GB / GIB if row.card_gb else None for row in done], ".2f"),
        ("largest process, GiB" if on_cpu else "PyTorch reserved, GiB", [max(row.reserved_gib) for row in done], ".2f"),
        ("PyTorch allocated, GiB", [None if on_cpu else max(row.allocated_gib) for row in done], ".2f"),
        (
            "allocated before step 1, GiB" if on_cpu else "reserved before step 1, GiB",
            [max(row.start_gib) for row in done],
            ".2f",
        ),
        ("host memory, GiB", [row.host_gib for row in done], ".2f"),
        ("increase on the whole machine, GiB", [row.host_rise_gib for row in done], ".2f"),
        ("control group's peak, GiB", [row.cgroup_gib for row in done], ".2f"),
        ("start-up, s", [row.start_s for row in done], ".1f"),
        ("first step, s", [row.first_step_s for row in done], ".1f"),
    ]
    if any(row.retries for row in done):
        figures.append(("waits for memory to be freed", [row.retries for row in done], ",.0f"))
    if run is not None:
        figures.append((f"hours for the run's {run:,} steps", [row.step_s * run / 3600 for row in done], ".2f"))
    rows = []
    for name, values, form in figures:
        if all(value is None for value in values):
            continue
        cells = ["" if value is None else format(value, form) for value in values]
        if len(values) > 1:
            mine, other = values[0], values[1]
            cells.append(f"{other / mine:.2f} x" if mine and other is not None else "")
        rows.append([name, *cells])
    if len(done[0].reserved_gib) > 1:
        each = [" ".join(f"{size:.2f}" for size in row.reserved_gib) for row in done]
        rows.append(["reserved by each process, GiB", *each, *([""] if len(done) > 1 else [])])
    row = PRESETS.get(done[0].preset or "")
    if row is not None and row.promised_gb is not None and not done[0].changes:
        blank = [""] * len(done)
        rows.append(["promised by the public guides, GB of 10^9", f"{row.promised_gb:.2f}", *blank[1:], *blank[1:]])
    names: list[str] = [row.recipe for row in done]
    if len(done) > 1 and names[0] == names[1]:
        names = [row.preset or "this run" for row in done]
    return [done[0].place, *names, *([f"{names[1]} / {names[0]}"] if len(done) > 1 else [])], rows
