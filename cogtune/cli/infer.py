"""``cogtune infer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cogtune.cli.sampling_options import (
    SAMPLING,
    SHOWN,
    BasePrecision,
    Fps,
    Frames,
    Guidance,
    NumberFormat,
    NumVideos,
    Scheduler,
    Seed,
    Steps,
    TextEncoderPrecision,
    VideoSize,
    Vram,
    numbers_of,
)
from cogtune.config.choices import VideoFormat
from cogtune.system import console

_FILES = "Files"


def infer(
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            help="A run's folder, a checkpoint, a Hub id, or a LoRA file of any program: diffusers, PEFT, kohya, "
            "ComfyUI, musubi-tuner, VideoX-Fun, DiffSynth-Studio, finetrainers, CogKit. Several work together; "
            "FILE:0.8 gives one a weight.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Base model, or the result of full fine-tuning: a run, a checkpoint, a merged folder, a Hub id. "
            r"\[default: what the LoRA was trained on]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help=r"What the video should show. Several prompts, or lines of a .txt file, make one video each. "
            r"\[default: the run's first caption]",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            help="First frame, for image-to-video models. Several, or a folder of images, make one video each.",
            show_default=False,
            rich_help_panel=SHOWN,
        ),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(
            "--video",
            help="Clip to transform. Several, or a folder of clips, make one video each.",
            show_default=False,
            rich_help_panel=SHOWN,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            help=r"How much --video is changed, from 0 to 1. \[default: 0.8]",
            show_default=False,
            rich_help_panel=SHOWN,
        ),
    ] = None,
    negative_prompt: Annotated[
        str,
        typer.Option(
            "--negative-prompt", help="What the video should not show.", show_default=False, rich_help_panel=SHOWN
        ),
    ] = "",
    id_token: Annotated[
        str | None,
        typer.Option(
            "--id-token",
            help=r"Trigger word put in front of the prompts; '' for none. \[default: as trained]",
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
    lora_scale: Annotated[
        str | None,
        typer.Option(
            "--lora-scale",
            help=r"Factor on the strength of all LoRAs. Several, as in 0.5,1,1.5, make one video each. "
            r"\[default: 1, as trained]",
            show_default=False,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            "--lora-alpha",
            help=r"Alpha the LoRA was trained with, if its file does not record it. "
            r"\[default: the file's alpha, or else its rank]",
            show_default=False,
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    precision: NumberFormat = None,
    base_precision: BasePrecision = None,
    text_encoder_precision: TextEncoderPrecision = None,
    vram: Vram = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help=r"Folder, or a single video's file: .mp4, .webp or .gif. \[default: the working folder, with names "
            "made of prompt and seed]",
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    format_: Annotated[
        VideoFormat | None,
        typer.Option(
            "--format",
            help=r"Video format. \[default: mp4]",
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    grid: Annotated[
        bool,
        typer.Option(
            "--grid", help="Also write one video that shows all of them side by side.", rich_help_panel=_FILES
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Make videos that already exist again.", rich_help_panel=_FILES)
    ] = False,
) -> None:
    """Sample videos; model, prompt, size and LoRA strength come from the run."""
    from cogtune.commands.infer.request import InferRequest, refuse_missing

    request = InferRequest(
        loras=tuple(lora or ()),
        model=model,
        prompts=tuple(prompt or ()),
        negative_prompt=negative_prompt,
        id_token=id_token,
        images=tuple(image or ()),
        videos=tuple(video or ()),
        strength=strength,
        size=size,
        frames=frames,
        fps=fps,
        precision=precision,
        base_precision=base_precision,
        text_encoder_precision=text_encoder_precision,
        num_videos=num_videos,
        seed=seed,
        steps=steps,
        guidance=guidance,
        scheduler=scheduler,
        lora_scales=numbers_of(lora_scale),
        lora_alpha=lora_alpha,
        vram=vram,
        output=output,
        format=format_,
        grid=grid,
        force=force,
    )
    refuse_missing(request)
    from cogtune.commands.infer.making import generate  # which imports torch

    for made in generate(request):
        console.say(f"{made.path}: {made.size} at {made.fps:g} fps: {made.prompt or 'no prompt'}")
