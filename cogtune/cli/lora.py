"""``cogtune lora``: LoRA files of any program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cogtune.cli.examples import epilog
from cogtune.cli.options import Json
from cogtune.cli.single_options import Commands
from cogtune.models.lora_formats import LoraFormatName
from cogtune.system import console

app = Commands(help="Show, convert, resize, merge, fuse and extract LoRA files of any program.",
               no_args_is_help=True)  # fmt: skip

LoraFile = Annotated[Path, typer.Argument(help="LoRA file of any program, adapter folder, checkpoint or run.")]
LoraFiles = Annotated[
    list[str],
    typer.Argument(help="LoRAs as for `cogtune lora show`, each with an optional weight: a.safetensors:0.8 b/"),
]
LoraAlpha = Annotated[
    float | None,
    typer.Option(
        "--lora-alpha",
        help=r"Alpha the LoRA was trained with, if its file does not record it. \[default: the rank]",
        show_default=False,
    ),
]
To = Annotated[
    LoraFormatName,
    typer.Option(
        "--to",
        help="Format to write: diffusers, PEFT's adapter folder, or that of kohya's programs, ComfyUI, OneTrainer, "
        "VideoX-Fun, DiffSynth-Studio, finetrainers.",
    ),
]
OutputFile = Annotated[Path, typer.Option("--output", help="File to write (.safetensors), or a folder for --to peft.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Dtype = Annotated[
    Literal["bf16", "fp16", "fp32"] | None,
    typer.Option(
        "--dtype", help=r"Number format to write. \[default: unchanged; fp32 for computed weights]", show_default=False
    ),
]


@app.command(epilog=epilog("lora show"))
def show(
    files: Annotated[
        list[Path], typer.Argument(help="LoRA files of any program, adapter folders, checkpoints or runs.")
    ],
    as_json: Json = False,
) -> None:
    """Show the rank, alpha, layers and models of LoRA files, and whether their strength is known."""
    from cogtune.commands import lora

    found = lora.show(files)
    if as_json:
        console.emit(found)
        return
    from cogtune.modeling.lora_files.describing import rows

    for one in found:
        console.table(one["file"], ("what", "value"), rows(one))


@app.command(epilog=epilog("lora convert"))
def convert(
    file: LoraFile, output: OutputFile, to: To = "diffusers", lora_alpha: LoraAlpha = None, force: Force = False
) -> None:
    """Write a LoRA in another program's format: the same numbers at the same strength, to the bit."""
    from cogtune.commands import lora

    made = lora.convert(file, output, to, alpha=lora_alpha, force=force)
    console.say(f"{output}: {len(made.pairs)} layers, for {to}")


@app.command(epilog=epilog("lora resize"))
def resize(
    file: LoraFile,
    output: OutputFile,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Maximum rank of every layer.")],
    to: To = "diffusers",
    lora_alpha: LoraAlpha = None,
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Lower a LoRA's rank by a singular value decomposition, and say how far the result is from it."""
    from cogtune.commands import lora

    made = lora.resize(file, output, rank, lora_format=to, alpha=lora_alpha, dtype=dtype, force=force)
    name, worst = made.worst
    console.say(f"{output}: rank {rank}, off by {made.error:.2%} of the LoRA's change, at worst {worst:.2%} ({name})")


@app.command(epilog=epilog("lora merge"))
def merge(
    files: LoraFiles,
    output: OutputFile,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            min=1,
            help=r"Rank of the result, by a singular value decomposition. \[default: the ranks' sum, which is exact]",
            show_default=False,
        ),
    ] = None,
    to: To = "diffusers",
    lora_alpha: LoraAlpha = None,
    dtype: Dtype = None,
    force: Force = False,
) -> None:
    """Blend several LoRAs into one, each times its weight."""
    from cogtune.commands import lora

    made = lora.merge(
        [lora.weighted(text) for text in files],
        output,
        rank=rank,
        lora_format=to,
        alpha=lora_alpha,
        dtype=dtype,
        force=force,
    )
    console.say(
        f"{output}: rank {max(made.lora.ranks)}, {len(made.lora.pairs)} layers, off by {made.error:.2%} of the sum"
    )


@app.command(epilog=epilog("lora fuse"))
def fuse(
    files: LoraFiles,
    model: Annotated[str, typer.Option("--model", help="Base model to fuse them into.")],
    output: Annotated[Path, typer.Option("--output", help="Folder to write, which diffusers loads.")],
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option("--dtype", help=r"Number format of the weights. \[default: the base's]", show_default=False),
    ] = None,
    lora_alpha: LoraAlpha = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest file, such as 5GB.")] = "5GB",
    copy_base: Annotated[
        bool, typer.Option("--copy-base", help="Copy the base model's other components instead of linking to them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder and everything in it.")] = False,
) -> None:
    """Write a base model with LoRAs in its weights, each times its weight."""
    from cogtune.commands import lora

    with console.progress("fusing", 0) as progress:
        made = lora.fuse(
            [lora.weighted(text) for text in files],
            model,
            output,
            alpha=lora_alpha,
            progress=progress.move_to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            copy_base=copy_base,
            force=force,
        )
    for part in made.missing:
        console.note(f"the base model on this machine has no {part}, so only the transformer was written")
    console.say(f"{made.weights}: {made.changed} of {made.tensors} tensors changed")


@app.command(epilog=epilog("lora extract"))
def extract(
    full: Annotated[Path, typer.Argument(help="Fine-tuned model: a run, a checkpoint or a merged folder.")],
    base: Annotated[str, typer.Argument(help="Model it was trained from, as for --model.")],
    output: OutputFile,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the LoRA.")] = 64,
    target_modules: Annotated[
        str | None,
        typer.Option(
            "--target-modules",
            help=r"Layers that get an adapter, by the ends of their names, with commas between. \[default: all]",
            show_default=False,
        ),
    ] = None,
    to: To = "diffusers",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option("--dtype", help="Number format of the LoRA.")
    ] = "fp32",
    force: Force = False,
) -> None:
    """Make a LoRA of the difference between a fine-tuned model and its base, and say what it leaves out."""
    from cogtune.commands import lora

    targets = [name.strip() for name in (target_modules or "").split(",") if name.strip()]
    with console.progress("extracting", 0) as progress:
        made = lora.extract(
            full,
            base,
            output,
            rank,
            targets=targets,
            lora_format=to,
            dtype=dtype,
            force=force,
            progress=progress.move_to,
        )
    name, worst = made.edited.worst
    console.say(
        f"{output}: rank {rank}, {len(made.edited.lora.pairs)} layers; leaves out {made.error:.2%} of the difference, "
        f"at worst {worst:.2%} of a layer's ({name}); {made.beside:.2%} lies where it has no adapter, such as biases"
    )
