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
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 on warnings too.")] = False,
    as_json: Json = False,
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
    report = runs.validate(resolved.config, page=page, page_clips=page_clips)
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
@with_config_flags("model", "precision", "size", "fps", "skip_start", "id_token", "cache_dir", *READING)
def cache(
    flags: Flags,
    folder: Folder = Path("data"),
    preset: PresetName = None,
    config: ConfigFile = None,
) -> None:
    """Encode clips and captions once, for training to read; what is there already is left alone."""
    from cogtune import runs
    from cogtune.config import resolve

    console.say(runs.cache(resolve(preset_name=preset, file=config, flags={**flags, "data": folder}).config))
