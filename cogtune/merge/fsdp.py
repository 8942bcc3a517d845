"""Checkpoints of ``torch.distributed.checkpoint``, as FSDP's sharded ones are, read by torch's own reader.

Such a folder is a file ``.metadata``, a pickle that says which part of each tensor is where, and files
``__RANK_N.distcp`` that hold each part as torch.save writes it. Torch unpickles whatever the former names; here
only the classes that it is made of are let through, every part is looked for before torch is asked for it, and no
process group is needed.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from cogtune.merge.archive import MOST_DESCRIPTION, Record, StoredTensor, read_archive, records_at
from cogtune.merge.sources import LoadedSource, Part, SavedWeights, Source, Values
from cogtune.merge.unpickling import RestrictedUnpickler
from cogtune.merge.zero import AGAIN
from cogtune.models.variants import Precision
from cogtune.system.errors import CogtuneError
from cogtune.system.files import open_regular, os_errors_explained, read_bytes

METADATA = ".metadata"

_OURS = "torch.distributed.checkpoint."
_CLASSES = {
    kind.__qualname__: kind
    for kind in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        _StorageInfo,
        _MEM_FORMAT_ENCODING,
    )
}
_PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class _Unpickler(RestrictedUnpickler):
    def is_key(self, value: Any) -> bool:
        if isinstance(value, MetadataIndex):
            value = (value.fqn, *(value.offset or ()), value.index or 0)
        return super().is_key(value)

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_OURS) and name in _CLASSES:
            return _CLASSES[name]
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        known = {("torch", "Size"): torch.Size, ("collections", "OrderedDict"): OrderedDict}
        if (module, name) in known:
            return known[module, name]
        if module.startswith("pathlib") and name.endswith("Path"):
            return pathlib.PurePath
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of such a file")


class _Reader(FileSystemReader):
    """Torch's reader, with what is known already of the folder."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


def read_sharded(folder: Path, tag: str) -> SavedWeights:
    """Return where every tensor of the checkpoint in ``folder / tag`` is. Reads no weights.

    Raises:
        CogtuneError: it is damaged or incomplete; all problems are listed.
    """
    place = folder / tag
    data = read_bytes(place / METADATA, MOST_DESCRIPTION * 8)
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
        problems: list[str] = []
        tensors = _tensors(metadata, problems)
        parts = _parts(place, metadata, tensors, problems)
    except Exception as error:  # damaged pickles fail in every way that Python can
        raise CogtuneError(f"{place / METADATA} is damaged: it cannot be read ({error})", AGAIN) from error
    if problems:
        raise CogtuneError(f"{folder} is damaged or incomplete", AGAIN, details=problems)
    known = Metadata(dict(tensors), storage_data=metadata.storage_data, storage_meta=StorageMeta())
    reader = _Reader(place, known)
    sources: dict[str, Values] = {
        name: LoadedSource(tuple(tensor.size), tensor.properties.dtype, _loading(reader, name, tensor), parts[name])
        for name, tensor in tensors.items()
        if math.prod(tensor.size)
    }
    ranks = {index.relative_path.split("_")[2] for index in metadata.storage_data.values()}
    return _saved(folder, tag, len(ranks), sources)


def read_full(folder: Path, name: str) -> SavedWeights:
    """Return where every tensor of a state dict is that one process saved for all, as FSDP does when so asked.

    Raises:
        CogtuneError: the file is damaged, or holds something else.
    """
    content = read_archive(folder / name)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CogtuneError(f"{folder / name} is not a state dict", "pass the checkpoint of a model")
    sources: dict[str, Values] = {
        key: Source(value.shape, (Part(value, 0, value.numel),))
        for key, value in content.items()
        if isinstance(value, StoredTensor) and value.numel
    }
    return _saved(folder, name, 1, sources)


def _saved(folder: Path, tag: str, ranks: int, sources: Mapping[str, Values]) -> SavedWeights:
    lora = {name: source for name, source in sources.items() if ".lora_" in name}
    sizes: dict[torch.dtype, int] = {}
    for source in sources.values():
        sizes[source.dtype] = sizes.get(source.dtype, 0) + source.numel
    most = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    # Which of them were trained, and which are an optimizer's, the files do not say.
    return SavedWeights(folder, tag, None, ranks, _PRECISIONS.get(most, "fp32"), lora, sources, lacks_frozen=False)


def _tensors(metadata: object, problems: list[str]) -> dict[str, TensorStorageMetadata]:
    """Return the tensors in a checkpoint by their names, each part of each in its place."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise TypeError("it describes something else")
    found = {}
    described: dict[Any, Any] = metadata.state_dict_metadata
    for name, tensor in described.items():
        if not isinstance(tensor, TensorStorageMetadata):  # a number, say, which torch would unpickle
            continue
        size = _numbers(tensor.size)
        if not isinstance(name, str) or not isinstance(tensor.properties.dtype, torch.dtype):
            raise TypeError("a tensor without a name or a type")
        filled = set()
        for chunk in tensor.chunks:
            offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
            ends = zip(offsets, sizes, size, strict=True)
            if any(offset + length > whole for offset, length, whole in ends):
                problems.append(f"a part of {name} lies outside it")
            filled.add((offsets, math.prod(sizes)))
        if sum(count for _, count in filled) != math.prod(size):
            problems.append(f"the parts of {name} do not make up the whole of it")
        found[name] = tensor
    return found


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise TypeError("a size that is none")
    return numbers


def _parts(
    place: Path, metadata: Metadata, tensors: Mapping[str, TensorStorageMetadata], problems: list[str]
) -> dict[str, list[Record]]:
    """Return the bytes of every part of every tensor, with their checksums."""
    where = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    wanted: dict[str, list[tuple[str, int, int]]] = {}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if (info := where.get((name, tuple(chunk.offsets)))) is None:
                problems.append(f"it does not say where a part of {name} is")
                continue
            if info.relative_path != Path(info.relative_path).name:
                raise ValueError(f"it names the file {info.relative_path}, which is not in its folder")
            if info.transform_descriptors:
                raise ValueError(f"parts are packed by {info.transform_descriptors}, which is not known here")
            start, length = _numbers((info.offset, info.length))
            wanted.setdefault(info.relative_path, []).append((name, start, length))
    found: dict[str, list[Record]] = {name: [] for name in tensors}
    for file_name, parts in sorted(wanted.items()):
        path = place / file_name
        try:
            with os_errors_explained(path, "read"), open_regular(path) as file:
                for name, start, length in parts:
                    found[name] += records_at(path, file, start, length)
        except CogtuneError as error:
            is_missing = isinstance(error.__cause__, FileNotFoundError)
            problems.append(f"{file_name} is missing" if is_missing else error.message.replace(str(path), file_name))
        except ValueError as error:
            problems.append(f"{file_name} is cut short or damaged: {error}")
    return found


def _loading(reader: _Reader, name: str, tensor: TensorStorageMetadata) -> Callable[[], torch.Tensor]:
    def load_one() -> torch.Tensor:
        whole = torch.empty(tensor.size, dtype=tensor.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a process group that it does without
            try:
                load({name: whole}, storage_reader=reader, no_dist=True)
            except (Exception, CheckpointException) as error:  # the latter is no Exception
                reason = (str(error).splitlines() or [type(error).__name__])[-1]
                raise CogtuneError(f"{reader.path}: {name} cannot be read ({reason})", AGAIN) from error
        return whole

    return load_one
