"""``cogtune merge-zero``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cogtune.system import console


def merge_zero(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint with shards, such as out/checkpoint-500.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help=r"Folder to write to. \[default: CHECKPOINT-merged]", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--model", help="Base model, for a checkpoint made by another program.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option("--dtype", help=r"Number format of the weights. \[default: the run's]", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest file, such as 5GB.")] = "5GB",
    copy_base: Annotated[
        bool,
        typer.Option("--copy-base", help="Copy the base model's other components instead of linking to them."),
    ] = False,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            "--lora-alpha",
            help="Alpha of the LoRA, for a checkpoint made by another program.",
            show_default=False,
            min=0,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder and everything in it.")] = False,
) -> None:
    """Merge a DeepSpeed (any ZeRO stage) or FSDP checkpoint into weights that diffusers loads, and verify them."""
    from cogtune.merge import merge_checkpoint
    from cogtune.models.locate import locate

    with console.progress("merging", 0) as progress:
        result = merge_checkpoint(
            checkpoint,
            output,
            base=locate(base, weights=False) if base else None,
            dtype=dtype,
            max_shard_size=max_shard_size,
            copy_base=copy_base,
            lora_alpha=lora_alpha,
            force=force,
            progress=progress.move_to,
            warn=console.warn,
        )
    if result.from_base:
        console.note(
            f"the checkpoint has no frozen parameters; {result.from_base} tensors were copied from the base model"
        )
    for part in result.missing:
        console.note(f"the base model on this machine has no {part}, so only the transformer was written")
    console.say(f"{result.weights}: {result.kind}, {result.tensors} tensors, {result.parameters:,} parameters")
