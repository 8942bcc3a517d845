"""``cogtune push``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cogtune.system import console
from cogtune.system.errors import UsageError


def push(
    run: Annotated[Path, typer.Argument(help="Run folder, checkpoint, merged folder or LoRA file.")],
    repo_id: Annotated[str, typer.Argument(help="Hub repository, user/name. It is created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to commit to, if not main.", show_default=False)
    ] = None,
    message: Annotated[
        str | None,
        typer.Option(
            "--message",
            help="Commit message. By default 'Upload with cogtune', or 'Checkpoint of step N' with --every.",
            show_default=False,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            help="Access token. Prefer HF_TOKEN, which does not show up in process lists.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(
            "--every",
            min=0,
            metavar="MINUTES",
            help="Push the checkpoints of a running training instead: look for a new one every MINUTES minutes, until "
            "the run ends. The newest is kept on the branch 'checkpoints'; `cogtune train --resume user/name` "
            "continues from it on any machine.",
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
    from cogtune.run.folder import RunFolder

    def listed(files: Sequence[tuple[str, int]]) -> None:
        for path, size in files:
            console.note(f"{path}  {size:,} bytes")

    if every is not None:
        if revision is not None or allow_outside:
            raise UsageError(
                f"--every cannot be used with {'--allow-outside' if revision is None else '--revision'}", "remove one"
            )
        url, steps = hub.push_checkpoints(
            run,
            repo_id,
            every=60 * every,
            private=private,
            token=token,
            message=message or "",
            dry_run=dry_run,
            tell=listed,
        )
        done = f"checkpoint of step {steps[-1]}"
        if RunFolder(run).lora.is_file() and not dry_run:
            words = ["cogtune", "push", str(run), repo_id]
            console.note(f"the run has finished; publish its LoRA with: {shlex.join(words)}")
        console.say(f"{done} would be uploaded to {url}" if dry_run else f"{done}: {url}")
        return
    result = hub.push(
        run,
        repo_id,
        private=private,
        token=token,
        revision=revision,
        message=message or "",
        dry_run=dry_run,
        allow_outside=allow_outside,
        tell=listed,
    )
    for remark in result.notes:
        console.note(remark)
    console.say(f"would be uploaded to {result.url}" if dry_run else result.url)
