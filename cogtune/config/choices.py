"""What the fields of a configuration can be set to."""

from __future__ import annotations

import re
from typing import Literal

DataFormat = Literal["lists", "csv", "tsv", "jsonl", "parquet", "beside", "datasets"]

Decoder = Literal["auto", "pyav", "decord"]
"""What reads clips; the frames are the same with each."""

DECODER_VARIABLE = "COGTUNE_DECODER"
"""Environment variable: the decoder of a process, and of those that it starts."""

Switch = Literal["auto", "on", "off"]
"""Of what is decided by the hardware unless the user knows better."""

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

Tracker = Literal["tensorboard", "wandb", "trackio"]

SEPARATOR = ":::"
"""Stands between several prompts, or images, in one line."""


_UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}


def bytes_of(text: str) -> int:
    """The bytes that an amount such as ``8GB`` means; 0 where it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    return int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
