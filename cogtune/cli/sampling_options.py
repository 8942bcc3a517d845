"""Options of the commands that sample videos."""

from __future__ import annotations

from typing import Annotated

import typer

from cogtune.models.variants import FrozenPrecision, Precision, SamplingScheduler

SHOWN, SAMPLING = "What to show", "How it is sampled"
"""Panels of ``--help``."""

NumVideos = Annotated[int, typer.Option("--num-videos", help="Videos per prompt.", min=1, rich_help_panel=SHOWN)]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", help="Seed of each prompt's first video; further ones count up from it.", min=0, max=2**63 - 1
    ),
]
VideoSize = Annotated[
    str | None,
    typer.Option(
        "--size", help=r"Height x width, or frames x height x width. \[default: as trained]", show_default=False
    ),
]
Frames = Annotated[
    int | None,
    typer.Option("--frames", help=r"Number of frames. \[default: as trained]", show_default=False, min=1),
]
Fps = Annotated[
    float | None,
    typer.Option("--fps", help=r"Frames per second of the file. \[default: as trained]", show_default=False, min=1),
]
Steps = Annotated[int, typer.Option("--steps", help="Denoising steps.", min=1, rich_help_panel=SAMPLING)]
Guidance = Annotated[
    float, typer.Option("--guidance", help="How closely to follow the prompt.", min=1, rich_help_panel=SAMPLING)
]
Scheduler = Annotated[
    SamplingScheduler | None,
    typer.Option(
        "--scheduler",
        help="DPM-Solver++ with dynamic guidance, or DDIM. "
        r"\[default: ddim for 2b, dpm for the rest, as in the public CogVideoX fine-tuning guides]",
        show_default=False,
        rich_help_panel=SAMPLING,
    ),
]
NumberFormat = Annotated[
    Precision | None,
    typer.Option(
        "--precision",
        help=r"Number format. \[default: as trained]",
        show_default=False,
        rich_help_panel=SAMPLING,
    ),
]
BasePrecision = Annotated[
    FrozenPrecision | None,
    typer.Option(
        "--base-precision",
        help="Precision of the matrix products with the base model's weights: fp8 halves them, on GPUs of compute "
        r"capability 8.9 and later. \[default: that of --precision]",
        show_default=False,
        rich_help_panel=SAMPLING,
    ),
]
TextEncoderPrecision = Annotated[
    FrozenPrecision | None,
    typer.Option(
        "--text-encoder-precision",
        help="Precision in which most of the text encoder's weights are stored: fp8 takes 5.9 GB instead of 9.5. "
        r"\[default: that of --precision]",
        show_default=False,
        rich_help_panel=SAMPLING,
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        help=r"GPU memory limit, such as 8GB; weights that do not fit are streamed from host memory. "
        r"\[default: the free memory]",
        show_default=False,
        rich_help_panel=SAMPLING,
    ),
]


def numbers_of(text: str | None) -> tuple[float, ...]:
    """Parse ``0.5,1,1.5``, the value of ``--lora-scale``.

    Raises:
        UsageError: one of them is none.
    """
    from cogtune.system.errors import UsageError

    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise UsageError(f"--lora-scale: '{text}' is not a list of numbers", "write it as 0.5,1,1.5") from None
