"""``cogtune import``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cogtune.cli.options import Json
from cogtune.system import console

_WORDS = {"kept": "kept", "better": "not needed", "none": "no counterpart", "to do": "to do"}


def import_run(
    path: Annotated[
        Path, typer.Argument(help="Shell script that starts a training, or CogKit's config.yaml.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", help="Configuration to write.")] = Path("run.yaml"),
    leave_out: Annotated[
        list[str] | None,
        typer.Option("--leave-out", help="An unknown flag to ignore; may be given more than once."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that --output names.")] = False,
    as_json: Json = False,
) -> None:
    """Turn another program's training script into a run.yaml, and report what became of each flag.

    Supported are CogVideo's finetune, CogKit, the diffusers example, CogVideoX Factory and finetrainers.
    """
    from cogtune.commands import importing

    made = importing.import_run(path, output, leave_out=leave_out or (), force=force)
    if as_json:
        remarks = [asdict(remark) for remark in made.remarks]
        console.emit({"program": made.given.program, "output": str(output), "keys": made.values, "flags": remarks})
        return
    rows = [(remark.flag, remark.value, _WORDS[remark.kind], remark.text) for remark in made.remarks]
    console.table("", (made.given.program, "value", "", "cogtune"), rows)
    console.say(f"{output}: try `cogtune plan --config {output}`")
