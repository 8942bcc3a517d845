"""``cogtune dataset``: check a dataset and encode it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogtune.cli.examples import epilog
from cogtune.cli.options import ClipDecoder, ConfigFile, Flags, Json, PresetName, use_decoder, with_config_flags
from cogtune.cli.single_options import Commands
from cogtune.config.run_config import tagged
from cogtune.system import console

if TYPE_CHECKING:
    from cogtune.config.run_config import RunConfig

app = Commands(help="Check and encode a folder of clips and captions.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of clips and captions, or user/name for a dataset on the Hub.")]


MOST_ROWS = 100
"""The number of findings of one kind shown on a terminal; a file or a pipe gets all of them."""


@app.command(epilog=epilog("dataset validate"))
@with_config_flags("model", *tagged("frames"), *tagged("reading"))
def validate(
    flags: Flags,
    folder: Folder = Path("data"),
    preset: PresetName = None,
    config: ConfigFile = None,
    full: Annotated[
        bool, typer.Option("--full", help="Decode every frame of every clip instead of one frame of each.")
    ] = False,
    decoder: ClipDecoder = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 on warnings as well.")] = False,
    as_json: Json = False,
    quarantine: Annotated[
        Path | None,
        typer.Option(
            "--quarantine",
            help="Also write the samples that have an error (or, with --strict, a warning) to this file, to leave "
            "them out of training.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--report", help="Also write an HTML page of clips and findings.", show_default=False),
    ] = None,
    page_clips: Annotated[
        int | None,
        typer.Option(
            "--report-clips", help=r"Clips shown with pictures on the page. \[default: 200]", min=0, show_default=False
        ),
    ] = None,
) -> None:
    """Open every clip and list all problems. Exits with 1 if any of them prevents training."""
    from cogtune.commands import validate as checking
    from cogtune.config.resolving import resolve
    from cogtune.data.findings import as_rows
    from cogtune.system.errors import counted

    use_decoder(decoder)
    resolved = resolve(preset_name=preset, file=config, flags={**flags, "data": folder})
    report = checking.validate(
        resolved.config, full=full, strict=strict, quarantine=quarantine, page=page, page_clips=page_clips
    )
    if as_json:
        console.emit(report.to_json())
    else:
        rows = as_rows(report.findings, MOST_ROWS if sys.stdout.isatty() else None)
        if rows:
            console.table("", ("", "where", "what", "what to do"), rows)
        found = ", ".join(counted(report.counts[severity], severity) for severity in ("error", "warning", "note"))
        console.say(f"{folder}: {counted(report.counts['samples'], 'sample')} ({report.layout}); {found}")
        if page is not None:
            console.say(f"written to {page}")
    failed = not report.ok or (strict and any(finding.severity == "warning" for finding in report.findings))
    raise typer.Exit(1 if failed else 0)


@app.command(epilog=epilog("dataset cache"))
@with_config_flags(
    "model", "precision", *tagged("frames"), "id_token", "cache_dir", "workers", "vae_tiling", "vae_compile",
    "quarantine", *tagged("reading"),
)  # fmt: skip
def cache(
    flags: Flags,
    folder: Folder = Path("data"),
    preset: PresetName = None,
    config: ConfigFile = None,
    decoder: ClipDecoder = None,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", min=1, help=r"Processes that share the work. \[default: one per GPU]"),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="Show what is cached and what is missing, then exit.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every entry and delete damaged ones. Exits with 1 if there were any.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Delete entries that this dataset does not use in this configuration."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before pruning.")] = False,
    as_json: Json = False,
) -> None:
    """Encode clips and captions for training. Entries that already exist are kept."""
    from cogtune.commands import cache
    from cogtune.config.resolving import resolve
    from cogtune.system.errors import UsageError

    use_decoder(decoder)
    resolved = resolve(preset_name=preset, file=config, flags={**flags, "data": folder})
    if status + verify + prune > 1:
        raise UsageError("--status, --verify and --prune cannot be used together", "pass one of them")
    if yes and not prune:
        raise UsageError("--yes requires --prune", "remove --yes")
    if status:
        _status(resolved.config, as_json)
        return
    if verify:
        _verify(resolved.config, as_json)
        return
    if prune:
        _prune(resolved.config, as_json, yes=yes)
        return
    done = cache.fill(resolved.config, processes=num_processes)
    if as_json:
        console.emit(done.to_json())
    else:
        console.say(str(done))


def _status(config: RunConfig, as_json: bool) -> None:
    from cogtune.commands.cache import look
    from cogtune.encoding.jobs import format_bytes
    from cogtune.system.errors import counted

    status = look(config)
    if as_json:
        console.emit(status.to_json())
        return
    rows = [(name, str(part.cached), str(part.missing), format_bytes(part.size)) for name, part in status.parts.items()]
    console.table("", ("", "cached", "missing", "size"), rows)
    complete = "complete" if status.complete else "incomplete"
    console.say(f"{status.root}: {counted(status.samples, 'sample')}, {complete}")
    if status.others:
        others = f"{counted(status.others, 'more entry', 'more entries')}, {format_bytes(status.others_size)}"
        console.say(f"{others}, not used by this configuration; --prune deletes them")


def _verify(config: RunConfig, as_json: bool) -> None:
    from cogtune.commands.cache import verify
    from cogtune.system.errors import counted

    checked, damaged = verify(config)
    if as_json:
        console.emit({"entries": checked, "damaged": [{"entry": str(path), "why": why} for path, why in damaged]})
    else:
        for path, why in damaged:
            console.say(f"{path}: {why}; deleted")
        again = "; run `cogtune dataset cache` to encode what is missing" if damaged else ""
        console.say(f"{counted(checked, 'entry', 'entries')} read, {len(damaged)} damaged{again}")
    raise typer.Exit(1 if damaged else 0)


def _prune(config: RunConfig, as_json: bool, *, yes: bool) -> None:
    from cogtune.commands.cache import delete, unused
    from cogtune.encoding.jobs import format_bytes
    from cogtune.system.errors import counted

    store, entries = unused(config)
    count, size = len(entries), sum(entry.size for entry in entries)
    noun = counted(count, "entry", "entries")
    if not as_json:
        console.say(f"{noun} in {store.root}, {format_bytes(size)}, not used by this dataset in this configuration")
    agreed = yes or (count > 0 and not as_json and sys.stdin.isatty() and typer.confirm("Delete them?"))
    if agreed:
        delete(store, entries)
    if as_json:
        console.emit({"cache": str(store.root), "entries": count, "bytes": size, "deleted": agreed})
    elif count:
        console.say("deleted" if agreed else "nothing was deleted; pass --yes to delete them")


@app.command(epilog=epilog("dataset bench"))
@with_config_flags("model", "precision", "size", "workers", "vae_tiling", "vae_compile")
def bench(
    flags: Flags,
    clips: Annotated[int, typer.Option("--clips", min=2, help="Number of clips to encode.")] = 64,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", min=1, help=r"Processes that share the work. \[default: one per GPU]"),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", help="Keep the random model and the clips in this folder and reuse them next time."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the speed of `dataset cache` on this machine, with a random model, drawn clips and no download."""
    from cogtune.bench.caching import bench_cache
    from cogtune.config.resolving import resolve

    figures = bench_cache(resolve(flags=flags).config, clips=clips, processes=num_processes, keep=keep)
    if as_json:
        console.emit(figures)
    else:
        console.table("", ("figure", "value"), [(name, str(value)) for name, value in figures.items()])
