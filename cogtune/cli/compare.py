"""``cogtune compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogtune.cli.options import Json
from cogtune.cli.sampling_options import (
    SHOWN,
    Fps,
    Frames,
    Guidance,
    NumberFormat,
    NumVideos,
    Scheduler,
    Seed,
    Steps,
    VideoSize,
    Vram,
    numbers_of,
)
from cogtune.system import console

_MEASURED = "What is measured"


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
            rich_help_panel=SHOWN,
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            help="First frame of each --prompt, for image-to-video models. One serves all.",
            show_default=False,
            rich_help_panel=SHOWN,
        ),
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(
            "--held-out", help="Number of captions of the run's validation data.", min=0, rich_help_panel=SHOWN
        ),
    ] = 4,
    unrelated: Annotated[
        list[str] | None,
        typer.Option(
            "--unrelated",
            help=r"Prompt that has nothing to do with the training data, or a .txt file of them. \[default: three of "
            "everyday scenes]",
            show_default=False,
            rich_help_panel=SHOWN,
        ),
    ] = None,
    num_videos: NumVideos = 1,
    seed: Seed = 42,
    size: VideoSize = None,
    frames: Frames = None,
    fps: Fps = None,
    steps: Steps = 50,
    guidance: Guidance = 6.0,
    scheduler: Scheduler = None,
    precision: NumberFormat = None,
    vram: Vram = None,
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
