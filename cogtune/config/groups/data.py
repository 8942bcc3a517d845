"""The model, the data, and what is taken of it."""

from __future__ import annotations

import functools
from pathlib import Path

from pydantic import BaseModel, ValidationInfo, field_validator

from cogtune.config.choices import DataFormat, Switch
from cogtune.config.fields import option
from cogtune.models.geometry import FrameSampling, Reshape, Size
from cogtune.models.variants import VARIANTS, Precision

_model = functools.partial(option, panel="Model")
_data = functools.partial(option, panel="Data")


class ModelFields(BaseModel):
    """The base model, and the number format of the arithmetic."""

    model: str = _model(
        "5b",
        help_text=f"A variant ({', '.join(VARIANTS)}), a Hub id, a local folder, or tiny:VARIANT.",
        tags=("machine",),
    )
    precision: Precision = _model(
        "bf16",
        help_text="Number format of the frozen weights and the arithmetic; fp16 is for 2b only.",
        tags=("resume",),
    )


class DataFields(BaseModel):
    """Where the data is, how it is read, and how it is encoded."""

    data: Path = _data(
        Path("data"),
        help_text="The folder of clips and captions, or user/name for a dataset on the Hub.",
        tags=("machine", "untimed"),
    )
    format: DataFormat | None = _data(
        None,
        help_text="How the data is laid out: lists of lines, a table, captions beside clips, or what the datasets "
        "library reads. [default: found out]",
        tags=("machine", "reading", "untimed"),
    )
    caption_column: str | None = _data(
        None, help_text="The column of a table that holds captions. [default: found out]", tags=("reading", "untimed")
    )
    video_column: str | None = _data(
        None,
        help_text="The column of a table that holds the clips' paths. [default: found out]",
        tags=("reading", "untimed"),
    )
    image_column: str | None = _data(
        None,
        help_text="The column of a table that holds the images' paths. [default: found out]",
        tags=("reading", "untimed"),
    )
    allow_outside: bool = _data(
        False,
        help_text="Take clips and images that are not in the dataset's folder too.",
        tags=("machine", "reading", "untimed"),
    )
    quarantine: Path | None = _data(
        None,
        help_text="A file of samples to leave out, as `cogtune dataset validate --quarantine` writes it.",
        tags=("machine", "untimed"),
    )
    cache_dir: Path | None = _data(
        None,
        help_text="Where encoded clips and captions are kept. [default: DATA/.cogtune]",
        tags=("machine", "untimed"),
    )
    workers: int | None = _data(
        None,
        ge=0,
        help_text="Processes that decode clips for each encoder; 0 for none of their own. [default: from the cores]",
        tags=("machine", "untimed"),
    )
    vae_tiling: Switch = _data(
        "auto",
        help_text="Encode clips in tiles: less memory, more time; auto where a whole one does not fit.",
        tags=("machine", "untimed"),
    )
    vae_compile: Switch = _data(
        "auto",
        help_text="Compile the VAE's encoder; auto on a GPU with more clips than the compile costs.",
        tags=("machine", "untimed"),
    )


class SampleFields(BaseModel):
    """What is taken of each clip and caption."""

    size: str | None = _data(
        None,
        help_text="Frames x height x width to train at, such as 49x480x720. [default: the model's own]",
        tags=("frames",),
    )
    fps: float | None = _data(
        None,
        gt=0,
        help_text="Frames per second taken from each clip. [default: the model's own]",
        tags=("frames", "untimed"),
    )
    frames: int | None = _data(
        None,
        ge=1,
        help_text="Number of frames, when it alone is to differ from the size. [default: the size's]",
        tags=("frames", "untimed"),
    )
    buckets: tuple[str, ...] = _data(
        (),
        help_text="Several sizes in place of one, such as 49x480x720,49x480x848: each clip is trained at the one that "
        "loses least of it. [default: none]",
        tags=("frames", "untimed"),
    )
    sampling: FrameSampling = _data(
        "head",
        help_text="Which frames: at the rate from the first on (head) or from a drawn one (random-start), or spread "
        "evenly over the whole clip at whatever rate follows (uniform).",
        tags=("frames", "untimed"),
    )
    skip_start: int = _data(0, ge=0, help_text="Frames skipped at the start of each clip.", tags=("frames", "untimed"))
    skip_end: int = _data(0, ge=0, help_text="Frames skipped at the end of each clip.", tags=("frames", "untimed"))
    reshape: Reshape = _data(
        "center",
        help_text="How frames get the size's shape: cut out their middle or a part drawn for each clip (center, "
        "random), add black bars (letterbox), or distort them (stretch).",
        tags=("frames", "untimed"),
    )
    id_token: str = _data(
        "", help_text="A word put in front of every caption, to call the trained concept by.", tags=("untimed",)
    )
    caption_dropout: float = _data(
        0.0,
        ge=0,
        le=1,
        help_text="Share of the samples trained with an empty caption, for guidance.",
        tags=("resume", "untimed"),
    )

    @field_validator("size")
    @classmethod
    def _size_reads(cls, text: str | None) -> str | None:
        return None if text is None else str(Size.parse(text))

    @field_validator("buckets")
    @classmethod
    def _buckets_read(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(Size.parse(text)) for text in texts))

    @field_validator("buckets")
    @classmethod
    def _buckets_stand_alone(cls, buckets: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if buckets and info.data.get("frames") is not None:
            raise ValueError(f"buckets say their own numbers of frames: leave out frames {info.data['frames']}")
        return buckets
