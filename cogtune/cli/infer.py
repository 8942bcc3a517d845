"""``cogtune infer``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from cogtune.system import console


def infer(
    lora: Annotated[
        Path | None,
        typer.Option(
            "--lora",
            help="A run's folder, a checkpoint, or a LoRA file of any program: diffusers, PEFT, kohya, ComfyUI, "
            "musubi-tuner, VideoX-Fun, DiffSynth-Studio, finetrainers, CogKit.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Base model, or the result of full fine-tuning: a run, a checkpoint or a merged folder. "
            r"\[default: the model the LoRA was trained on]",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", help=r"What the video should show. \[default: the run's first caption]", show_default=False
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", help="First frame, for image-to-video models.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help=r"Video file to write (.mp4). \[default: video.mp4, or video-2.mp4 and so on if it exists]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the --output file if it exists.")] = False,
    size: Annotated[
        str | None,
        typer.Option("--size", help=r"Frames x height x width. \[default: as trained]", show_default=False),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option("--fps", help=r"Frames per second of the video file. \[default: as trained]", min=1),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.", min=0, max=2**63 - 1)] = 42,
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps.", min=1)] = 50,
    guidance: Annotated[float, typer.Option("--guidance", help="How closely to follow the prompt.", min=1)] = 6.0,
    lora_scale: Annotated[
        float | None,
        typer.Option(
            "--lora-scale", help=r"Factor on the LoRA's strength. \[default: 1, as trained]", show_default=False
        ),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            "--lora-alpha",
            help=r"Alpha the LoRA was trained with, if its file does not record it. \[default: the file's alpha, "
            "or else its rank]",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option("--precision", help=r"Number format. \[default: as trained]", show_default=False),
    ] = None,
) -> None:
    """Sample a video. Model, prompt, size and LoRA strength default to those of the run."""
    from cogtune.models.geometry import Size
    from cogtune.system.errors import UsageError

    endless = [
        f"--{name}: {value} is not a finite number"
        for name, value in (
            ("fps", fps),
            ("guidance", guidance),
            ("lora-scale", lora_scale),
            ("lora-alpha", lora_alpha),
        )
        if value is not None and not math.isfinite(value)
    ]
    if lora_alpha is not None and lora_alpha <= 0:
        endless.append(f"--lora-alpha: {lora_alpha:g} is not greater than 0")
    if endless:
        raise UsageError("invalid options", "correct these values", details=endless)
    try:
        asked = Size.parse(size) if size else None
    except ValueError as error:
        raise UsageError(f"--size: {error}") from error
    if output is not None and output.suffix.lower() != ".mp4":
        raise UsageError(f"--output {output}: the file name must end in .mp4", "choose a name such as video.mp4")
    from cogtune.commands.infer import InferRequest, generate

    request = InferRequest(
        lora=lora,
        model=model,
        prompt=prompt,
        image=image,
        size=asked,
        fps=fps,
        precision=precision,
        seed=seed,
        steps=steps,
        guidance=guidance,
        lora_scale=lora_scale,
        lora_alpha=lora_alpha,
    )
    with console.progress("sampling", steps) as progress:
        made = generate(request, output, lambda _step: progress.advance(), force=force)
    recipe = made.recipe
    console.say(f"{made.video}: {recipe.size} at {recipe.fps:g} fps: {recipe.prompt or 'no prompt'}")
