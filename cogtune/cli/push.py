"""``cogtune push``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cogtune.system import console


def push(
    run: Annotated[Path, typer.Argument(help="Run folder, checkpoint, merged folder or LoRA file.")],
    repo_id: Annotated[str, typer.Argument(help="Hub repository, user/name. It is created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to commit to, if not main.", show_default=False)
    ] = None,
    message: Annotated[str, typer.Option("--message", help="Commit message.")] = "Upload with cogtune",
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            help="Access token. Prefer HF_TOKEN, which does not show up in process lists.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files that would be uploaded, then exit.")
    ] = False,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Also upload files outside the folder that links in it point to.")
    ] = False,
) -> None:
    """Upload weights, a model card and sample videos to the Hugging Face Hub.

    Authenticate with `hf auth login`, or set HF_TOKEN.
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
