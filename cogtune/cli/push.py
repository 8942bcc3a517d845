"""``cogtune push``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cogtune.system import console


def push(
    run: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint, a merged folder or a LoRA file.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, user/name; made when it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch other than main.", show_default=False)
    ] = None,
    message: Annotated[str, typer.Option("--message", help="The commit's message.")] = "Upload with cogtune",
    token: Annotated[
        str | None,
        typer.Option(
            "--token", help="Access token; better in HF_TOKEN, where no process list shows it.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and stop.")] = False,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Upload also what links bring in from outside of the folder.")
    ] = False,
) -> None:
    """Upload weights, a model card and sample videos to the Hugging Face Hub.

    The token comes from HF_TOKEN or from `hf auth login`.
    """
    from cogtune import hub

    def listed(files: Sequence[tuple[str, int]]) -> None:
        for path, size in files:
            console.note(f"{path}  {size:,} bytes")

    result = hub.push(
        run,
        repo_id,
        private=private,
        token=token,
        revision=revision,
        message=message,
        dry_run=dry_run,
        allow_outside=allow_outside,
        tell=listed,
    )
    for remark in result.notes:
        console.note(remark)
    console.say(f"would be uploaded to {result.url}" if dry_run else result.url)
