"""``cogtune dataset``: look at a dataset, and encode it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogtune import console
from cogtune.cli.options import ConfigFile, Flags, Json, PresetName, with_config_flags

app = typer.Typer(help="Check a folder of clips and captions, and encode it.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Argument(help="The folder of clips and captions, or user/name for a dataset on the Hub.")
]

READING = ("format", "caption_column", "video_column", "image_column", "allow_outside")
"""The flags that say how the folder is read."""


@app.command()
@with_config_flags("model", "size", "fps", "skip_start", *READING)
def validate(
    flags: Flags,
    folder: Folder = Path("data"),
    preset: PresetName = None,
    config: ConfigFile = None,
    full: Annotated[
        bool, typer.Option("--full", help="Decode every frame of every clip, rather than one of each.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 on warnings too.")] = False,
    as_json: Json = False,
    quarantine: Annotated[
        Path | None,
        typer.Option(
            "--quarantine",
            help="Also list the samples with an error (with --strict, a warning) in this file, to leave them out.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--report", help="Also write an HTML page that shows clips and findings.", show_default=False),
    ] = None,
    page_clips: Annotated[
        int | None,
        typer.Option(
            "--report-clips", help=r"Clips with pictures in the page. \[default: 200]", min=0, show_default=False
        ),
    ] = None,
) -> None:
    """Open every clip and list all problems; exit 1 if any of them stops training."""
    from cogtune import runs
    from cogtune.config import resolve

    resolved = resolve(preset_name=preset, file=config, flags={**flags, "data": folder})
    report = runs.validate(
        resolved.config, full=full, strict=strict, quarantine=quarantine, page=page, page_clips=page_clips
    )
    if as_json:
        console.emit(report.to_json())
    else:
        rows = [(f.severity, f.where, f.message, f.hint) for f in report.findings]
        if rows:
            console.table("", ("", "where", "what", "what to do"), rows)
        counted = ", ".join(f"{report.counts[severity]} {severity}s" for severity in ("error", "warning", "note"))
        console.say(f"{folder}: {report.counts['samples']} samples ({report.layout}); {counted}")
        if page is not None:
            console.say(f"written to {page}")
    failed = not report.ok or (strict and any(finding.severity == "warning" for finding in report.findings))
    raise typer.Exit(1 if failed else 0)


@app.command()
@with_config_flags(
    "model", "precision", "size", "fps", "skip_start", "id_token", "cache_dir", "workers", "vae_tiling", "vae_compile",
    "quarantine", *READING,
)  # fmt: skip
def cache(
    flags: Flags,
    folder: Folder = Path("data"),
    preset: PresetName = None,
    config: ConfigFile = None,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", min=1, help="Processes that share the work. [default: one a GPU]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Encode clips and captions once, for training to read; what is there already is left alone."""
    from cogtune import runs
    from cogtune.config import resolve

    resolved = resolve(preset_name=preset, file=config, flags={**flags, "data": folder})
    done = runs.cache(resolved.config, processes=num_processes)
    if as_json:
        console.emit(done.to_json())
    else:
        console.say(str(done))


@app.command()
@with_config_flags("model", "precision", "size", "workers", "vae_tiling", "vae_compile")
def bench(
    flags: Flags,
    clips: Annotated[int, typer.Option("--clips", min=2, help="Clips that are encoded.")] = 64,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", min=1, help="Processes that share the work. [default: one a GPU]"),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", help="Keep the random model and the clips in this folder, for the next time."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how fast `dataset cache` is here: random weights of the real size, drawn clips, no download."""
    from cogtune.bench.caching import bench_cache
    from cogtune.config import resolve

    figures = bench_cache(resolve(flags=flags).config, clips=clips, processes=num_processes, keep=keep)
    if as_json:
        console.emit(figures)
    else:
        console.table("", ("figure", "value"), [(name, str(value)) for name, value in figures.items()])
