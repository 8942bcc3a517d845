"""Where the values of a merged tensor are: in parts of stored tensors, or in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cogtune.merge.archive import CHUNK_BYTES, Record, StoredTensor
from cogtune.models.variants import Precision


@dataclass(frozen=True)
class Part:
    """The values ``start`` to ``start + length`` of a flattened stored tensor."""

    tensor: StoredTensor
    start: int
    length: int


@dataclass(frozen=True)
class Source:
    """One whole tensor: its shape, and the parts that make it up, in order."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type its values are stored in."""
        return self.parts[0].tensor.dtype

    @property
    def records(self) -> list[Record]:
        """The bytes that hold its values."""
        return [part.tensor.record for part in self.parts]

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield its values in order, flat, a few MB at a time."""
        for part in self.parts:
            yield from part.tensor.chunks(part.start, part.length)


@dataclass(frozen=True)
class LoadedSource:
    """One whole tensor that a library loads, alone in memory while its values are taken."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    records: list[Record]

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield its values in order, flat, a few MB at a time."""
        yield from self.load().reshape(-1).split(CHUNK_BYTES // self.dtype.itemsize)


Values = Source | LoadedSource


@dataclass(frozen=True)
class SavedWeights:
    """What a checkpoint holds.

    ``trained`` are the parameters that the optimizer had; ``kept`` the frozen parameters and the buffers, so far as
    they were saved. Both are in the order of the files, so that reading is sequential. Where the files do not say which
    were trained, those of a LoRA were. ``stage`` is ZeRO's, 0 for DeepSpeed without it, and None where another library
    saved; then ``tag`` is the folder's or file's own name. ``lacks_frozen`` says that what it lacks was frozen.
    """

    folder: Path
    tag: str
    stage: int | None
    world_size: int
    precision: Precision
    trained: Mapping[str, Values]
    kept: Mapping[str, Values]
    lacks_frozen: bool = True


def records_of(sources: Iterable[Values]) -> list[Record]:
    """Return the records that hold ``sources``, each once."""
    return list(dict.fromkeys(record for source in sources for record in source.records))


def check_bytes(sources: Iterable[Values], on_bytes: Callable[[int], None]) -> list[str]:
    """Compare every byte that ``sources`` need with its checksum; the damaged files, as problems.

    Bytes that are not needed, such as the optimizer's moments, are not read.
    """
    records = records_of(sources)
    with ThreadPoolExecutor(max_workers=4) as pool:  # checksums are computed outside the interpreter's lock
        sound = list(pool.map(lambda record: record.is_sound(on_bytes), records))
    damaged = dict.fromkeys(record.path for record, fine in zip(records, sound, strict=True) if not fine)
    return [f"{path.name} is damaged: checksum mismatch in its weights" for path in damaged]
