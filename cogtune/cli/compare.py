"""``cogtune compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogtune.cli.infer import numbers_of
from cogtune.cli.options import Json
from cogtune.models.variants import Precision, SamplingScheduler
from cogtune.system import console

_SHOWN, _SAMPLING, _MEASURED = "What to show", "How it is sampled", "What is measured"


def compare(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Runs, checkpoints, LoRA files of any program, adapters, full weights, Hub ids of LoRAs; of a run, "
            "all its checkpoints. `base` is always included.",
            metavar="WEIGHTS...",
        ),
    ],
    lora_scale: Annotated[
        str | None,
        typer.Option(
            "--lora-scale",
            help=r"Strengths of each LoRA, such as 0.5,1,1.5. \[default: 1, as trained]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help=r"Base model. \[default: what the weights were trained on]", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help=r"Folder for the videos, compare.html and compare.json. \[default: compare/ in the run's folder]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help=r"Prompt, or a .txt file with one per line. \[default: those of the run's sample videos, or its "
            "first caption]",
            show_default=False,
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            help="First frame of each --prompt, for image-to-video models. One serves all.",
            show_default=False,
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(
            "--held-out", help="Number of captions of the run's validation data.", min=0, rich_help_panel=_SHOWN
        ),
    ] = 4,
    unrelated: Annotated[
        list[str] | None,
        typer.Option(
            "--unrelated",
            help=r"Prompt that has nothing to do with the training data, or a .txt file of them. \[default: three of "
            "everyday scenes]",
            show_default=False,
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    num_videos: Annotated[
        int, typer.Option("--num-videos", help="Videos per prompt.", min=1, rich_help_panel=_SHOWN)
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            help="Seed of each prompt's first video; further ones count up from it.",
            min=0,
            max=2**63 - 1,
            rich_help_panel=_SHOWN,
        ),
    ] = 42,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            help=r"Height x width, or frames x height x width. \[default: as trained]",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames",
            help=r"Number of frames. \[default: as trained]",
            show_default=False,
            min=1,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            "--fps",
            help=r"Frames per second. \[default: as trained]",
            min=1,
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps.", min=1, rich_help_panel=_SAMPLING)] = 50,
    guidance: Annotated[
        float,
        typer.Option("--guidance", help="How closely to follow the prompt.", min=1, rich_help_panel=_SAMPLING),
    ] = 6.0,
    scheduler: Annotated[
        SamplingScheduler | None,
        typer.Option(
            "--scheduler",
            help=r"DPM-Solver++ with dynamic guidance, or DDIM. \[default: as for cogtune infer]",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            "--precision",
            help=r"Number format. \[default: as trained]",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option(
            "--vram",
            help=r"GPU memory limit, such as 8GB. \[default: the free memory]",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help=r"Folder of the training clips. \[default: the run's]",
            show_default=False,
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            "--clip",
            help="Also measure the similarity of videos and prompts with this CLIP model: a folder, or a Hub id that "
            "is already on this machine. Nothing is downloaded.",
            show_default=False,
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Did it work? Sample the base and all checkpoints alike, measure them, and choose one.

    Videos that exist are not made again, so the command continues where it was stopped.
    """
    from cogtune.commands.compare import CompareRequest
    from cogtune.commands.compare import compare as run

    request = CompareRequest(
        targets=tuple(targets),
        model=model,
        lora_scales=numbers_of(lora_scale),
        prompts=tuple(prompt or ()),
        images=tuple(image or ()),
        unrelated=tuple(unrelated or ()),
        held_out=held_out,
        data=data,
        clip=clip,
        num_videos=num_videos,
        seed=seed,
        size=size,
        frames=frames,
        fps=fps,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        precision=precision,
        vram=vram,
        output=output,
    )
    found, page = run(request)
    if as_json:
        console.emit(found.model_dump(mode="json"))
        return
    for row in found.rows:
        for sign in row.signs:
            console.say(f"{row.title}: {sign.name}: {sign.why}")
            console.say(f"  to change it, {sign.advice}")
    console.say(found.verdict)
    console.say(str(page))
