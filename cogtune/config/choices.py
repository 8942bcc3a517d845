"""The values that configuration fields accept."""

from __future__ import annotations

import re
from typing import Literal

DataFormat = Literal["lists", "csv", "tsv", "jsonl", "parquet", "sidecar", "datasets"]

FORMER_FORMATS: dict[object, DataFormat] = {"beside": "sidecar"}
"""Names of formats in the files of runs made by cogtune 0.1, and what they are called now."""

Decoder = Literal["auto", "pyav", "decord"]
"""What reads clips; the frames are the same with each."""

DECODER_VARIABLE = "COGTUNE_DECODER"
"""Environment variable: the decoder of a process, and of those that it starts."""

Switch = Literal["auto", "on", "off"]
"""A setting that the hardware decides by default."""

LrScheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
]

TimestepDistribution = Literal["uniform", "logit-normal"]

VideoFormat = Literal["mp4", "webp", "gif"]
"""What a sampled video is written as."""

Tracker = Literal["tensorboard", "wandb", "trackio"]

SEPARATOR = ":::"
"""The separator between several prompts, or images, in one line."""


_UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}


def parse_bytes(text: str) -> int:
    """Parse an amount of memory such as ``8GB`` into bytes; 0 if it is not one."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    return int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
