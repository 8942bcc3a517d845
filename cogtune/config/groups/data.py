"""The model, the data, and which part of it is used."""

from __future__ import annotations

import functools
from pathlib import Path

from pydantic import BaseModel, ValidationInfo, field_validator

from cogtune.config.choices import FORMER_FORMATS, DataFormat, Switch
from cogtune.config.fields import option
from cogtune.models.geometry import FrameSampling, Reshape, Size
from cogtune.models.variants import VARIANTS, Precision

_model = functools.partial(option, panel="Model")
_data = functools.partial(option, panel="Data")


class ModelFields(BaseModel):
    """The base model and the number format of the computation."""

    model: str = _model(
        "5b",
        help_text=f"Base model: a variant ({', '.join(VARIANTS)}), a Hub id, a local folder, or tiny:VARIANT.",
        tags=("machine",),
    )
    precision: Precision = _model(
        "bf16",
        help_text="Number format of frozen weights and computation; fp16 is for 2b only.",
        tags=("resume",),
    )


class DataFields(BaseModel):
    """Where the data is, and how it is read and encoded."""

    data: Path = _data(
        Path("data"),
        help_text="Folder of clips and captions, or user/name for a dataset on the Hub.",
        tags=("machine", "untimed"),
    )
    format: DataFormat | None = _data(
        None,
        help_text="Layout of the data: line lists, a table, sidecar captions, or whatever the datasets library reads. "
        "[default: detected]",
        tags=("machine", "reading", "untimed"),
    )
    caption_column: str | None = _data(
        None, help_text="Table column with the captions. [default: detected]", tags=("reading", "untimed")
    )
    video_column: str | None = _data(
        None,
        help_text="Table column with the clips' paths. [default: detected]",
        tags=("reading", "untimed"),
    )
    image_column: str | None = _data(
        None,
        help_text="Table column with the images' paths. [default: detected]",
        tags=("reading", "untimed"),
    )
    allow_outside: bool = _data(
        False,
        help_text="Also read clips and images outside the dataset's folder.",
        tags=("machine", "reading", "untimed"),
    )
    quarantine: Path | None = _data(
        None,
        help_text="File that lists samples to leave out, written by `cogtune dataset validate --quarantine`.",
        tags=("machine", "untimed"),
    )
    cache_dir: Path | None = _data(
        None,
        help_text="Folder for encoded clips and captions. [default: DATA/.cogtune]",
        tags=("machine", "untimed"),
    )
    workers: int | None = _data(
        None,
        ge=0,
        help_text="Decoder processes for each encoder; 0 to decode in the encoder's own. [default: by the number of "
        "cores]",
        tags=("machine", "untimed"),
    )
    vae_tiling: Switch = _data(
        "auto",
        help_text="Encode clips in tiles, which takes less memory and more time; auto if a whole clip does not fit.",
        tags=("machine", "untimed"),
    )
    vae_compile: Switch = _data(
        "auto",
        help_text="Compile the VAE's encoder; auto on a GPU if there are enough clips to make up for it.",
        tags=("machine", "untimed"),
    )

    @field_validator("format", mode="before")
    @classmethod
    def _current_name(cls, value: object) -> object:
        return FORMER_FORMATS.get(value, value) if isinstance(value, str) else value


class SampleFields(BaseModel):
    """Which part of each clip and caption is used."""

    size: str | None = _data(
        None,
        help_text="Training size, frames x height x width, such as 49x480x720. [default: the model's own]",
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
        help_text="Number of frames, if only that differs from the size. [default: the size's]",
        tags=("frames", "untimed"),
    )
    buckets: tuple[str, ...] = _data(
        (),
        help_text="Several sizes instead of one, such as 49x480x720,49x480x848. Each clip is trained at the size that "
        "loses least of it. [default: none]",
        tags=("frames", "untimed"),
    )
    sampling: FrameSampling = _data(
        "head",
        help_text="Which frames to use: at the frame rate from the first one (head) or from a random one "
        "(random-start), or "
        "spread evenly over the whole clip at any rate (uniform).",
        tags=("frames", "untimed"),
    )
    skip_start: int = _data(0, ge=0, help_text="Frames skipped at the start of each clip.", tags=("frames", "untimed"))
    skip_end: int = _data(0, ge=0, help_text="Frames skipped at the end of each clip.", tags=("frames", "untimed"))
    reshape: Reshape = _data(
        "center",
        help_text="How frames are fitted to the size: crop the centre or a random part (center, random), add black "
        "bars "
        "(letterbox), or distort them (stretch).",
        tags=("frames", "untimed"),
    )
    id_token: str = _data("", help_text="Trigger word put in front of every caption.", tags=("untimed",))
    caption_dropout: float = _data(
        0.0,
        ge=0,
        le=1,
        help_text="Fraction of samples trained with an empty caption, for guidance.",
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
            raise ValueError(
                f"cannot be used with frames {info.data['frames']}: buckets have their own numbers of frames"
            )
        return buckets
