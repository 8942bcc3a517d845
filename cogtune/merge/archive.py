"""Files of ``torch.save``, read without running what is pickled in them, and without loading them.

Such a file is an uncompressed zip: ``data.pkl`` describes the objects; ``data/0``, ``data/1``, ... are the
raw bytes of the tensors. Here tensors come back as places in the file, and every class that is not one of
a few harmless ones as an inert stand-in: a checkpoint from a stranger cannot execute code, and DeepSpeed,
whose classes are pickled in its checkpoints, need not be installed.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cogtune.merge.unpickling import RestrictedUnpickler
from cogtune.system.errors import CogtuneError
from cogtune.system.files import open_regular, os_errors_explained

CHUNK_BYTES = 1 << 22
"""How much of a tensor is in memory at a time."""

MOST_DESCRIPTION = 1 << 22
"""Bytes of the largest description of objects that is read; that of a model of a thousand parameters takes 0.3 MB."""

_DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Record:
    """A tensor's raw bytes inside a file: where they are, and their CRC-32 if the file has one."""

    path: Path
    offset: int
    size: int
    crc: int | None

    def is_sound(self, on_bytes: Callable[[int], None]) -> bool:
        """Return whether the bytes are all there and have their checksum; tells ``on_bytes`` how many were read."""
        crc = 0
        with os_errors_explained(self.path, "read"), self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            left = self.size
            while left:
                data = file.read(min(left, CHUNK_BYTES))
                if not data:
                    return False
                crc = zlib.crc32(data, crc)
                left -= len(data)
                on_bytes(len(data))
        return self.crc is None or crc == self.crc


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a place in a file. ``offset`` and ``stride`` count elements of the record."""

    record: Record
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its values lie in the file one after the other."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def chunks(self, start: int, length: int) -> Iterator[torch.Tensor]:
        """Yield the values ``start`` to ``start + length`` of the flattened tensor, a few MB at a time."""
        step = CHUNK_BYTES // self.dtype.itemsize
        if not self.is_contiguous:
            whole = _read(self.record, self.dtype, 0, self.record.size // self.dtype.itemsize)
            for begin in range(start, start + length, step):
                yield whole[self._places(begin, min(begin + step, start + length))]
            return
        for begin in range(start, start + length, step):
            yield _read(self.record, self.dtype, self.offset + begin, min(step, start + length - begin))

    def _places(self, begin: int, end: int) -> torch.Tensor:
        """Return where in the record the values ``begin`` to ``end`` are: one place may hold many (a stride of 0)."""
        left, places = torch.arange(begin, end), torch.full((end - begin,), self.offset)
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            places += left % size * stride
            left //= size
        return places


def _read(record: Record, dtype: torch.dtype, start: int, count: int) -> torch.Tensor:
    data = bytearray(count * dtype.itemsize)
    with os_errors_explained(record.path, "read"), record.path.open("rb", buffering=0) as file:
        file.seek(record.offset + start * dtype.itemsize)
        filled = 0
        while filled < len(data):
            got = file.readinto(memoryview(data)[filled:])
            if not got:
                raise CogtuneError(f"{record.path} was truncated while it was read", "run the command again")
            filled += got
    return torch.frombuffer(data, dtype=dtype)


def name_when_saved(path: Path) -> str:
    """Return the name that torch.save was given for a file, which it keeps as the folder of all that is inside.

    Raises:
        CogtuneError: it cannot be read.
    """
    with os_errors_explained(path, "read"), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        return f"{archive.namelist()[0].partition('/')[0]}.pt"


class _Stub:
    """Stands for every class that is not needed: takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Stub:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    record, dtype = storage
    tensor = StoredTensor(record, dtype, offset, tuple(shape), tuple(stride))
    numbers = (offset, *tensor.shape, *tensor.stride)
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise pickle.UnpicklingError("a tensor has an invalid offset, shape or stride")
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
    if tensor.numel and not offset + last < record.size // dtype.itemsize:
        raise pickle.UnpicklingError("a tensor lies outside its storage")
    return tensor


def _ordered() -> OrderedDict[Any, Any]:
    return OrderedDict()


def _same(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    return function(*arguments)


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,  # its items come afterwards, one by one
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _same,
    ("torch._utils", "_rebuild_parameter_with_state"): _same,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
}


class _Unpickler(RestrictedUnpickler):
    def __init__(self, file: io.BytesIO, records: dict[str, Record]) -> None:
        super().__init__(file)
        self._records = records

    def is_key(self, value: Any) -> bool:
        return isinstance(value, _Stub) or super().is_key(value)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _KNOWN.get((module, name), _Stub)

    def persistent_load(self, reference: Any) -> tuple[Record, torch.dtype]:
        _, dtype, key, _, _ = reference
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a tensor has an unsupported dtype")
        return self._records[key], dtype


def read_archive(path: Path) -> Any:
    """Return the object that ``torch.save`` wrote to ``path``, with a :class:`StoredTensor` for every tensor.

    Reads the description of the objects only. Objects of unknown classes become inert stand-ins.

    Raises:
        CogtuneError: the file is missing, cut short, or not such a file.
    """
    hint = "copy the file again from its source, or use an earlier checkpoint"
    try:
        with os_errors_explained(path, "read"), open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            description = next(info for info in members if info.filename.endswith("/data.pkl"))
            folder = description.filename.removesuffix("data.pkl") + "data/"
            has_checksums = description.CRC != 0  # torch can be told to leave them out: then all are zero
            records = _records(path, file, members, folder, has_checksums=has_checksums)
            if description.file_size > MOST_DESCRIPTION:
                raise CogtuneError(
                    f"{path} describes its objects in {description.file_size:,} bytes, and {MOST_DESCRIPTION:,} are "
                    "the most that is read",
                    "check that it is a model's checkpoint",
                )
            # zipfile itself would refuse the description of a file that carries no checksums
            file.seek(_data_offset(file, description))
            data = file.read(description.file_size)
    except (zipfile.BadZipFile, StopIteration, ValueError, NotImplementedError, OverflowError) as error:
        raise CogtuneError(f"{path} is truncated, or was not written by torch.save", hint) from error
    if has_checksums and zlib.crc32(data) != description.CRC:
        raise CogtuneError(f"{path} is damaged: checksum mismatch in its index", hint)
    try:
        return _Unpickler(io.BytesIO(data), records).load()
    except Exception as error:  # damaged pickles fail in every way that Python can
        raise CogtuneError(f"{path} is damaged: its index cannot be read", hint) from error


def _records(
    path: Path, file: BinaryIO, members: Sequence[zipfile.ZipInfo], folder: str, *, has_checksums: bool, start: int = 0
) -> dict[str, Record]:
    """Return the tensors' bytes in a zip that begins at ``start`` of ``path``, by their names.

    Raises:
        ValueError: one is compressed, or lies elsewhere than the zip says.
    """
    file.seek(0, io.SEEK_END)
    if sum(info.file_size for info in members) > file.tell():
        raise ValueError("parts that lie in each other")
    return {
        info.filename.removeprefix(folder): Record(
            path, start + _data_offset(file, info), info.file_size, info.CRC if has_checksums else None
        )
        for info in members
        if info.filename.startswith(folder)
    }


class _Window(io.RawIOBase):
    """A part of a file, as a separate file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise ValueError("a place before the beginning")
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def records_at(path: Path, file: BinaryIO, start: int, length: int) -> list[Record]:
    """Return the tensors' bytes in what torch.save wrote to a part of a file.

    Raises:
        ValueError: there is no such thing there, or it is cut short.
    """
    window = io.BufferedReader(_Window(file, start, length))
    try:
        with zipfile.ZipFile(window) as archive:
            members = archive.infolist()
            description = next(info for info in members if info.filename.endswith("/data.pkl"))
            folder = description.filename.removesuffix("data.pkl") + "data/"
            return list(
                _records(path, window, members, folder, has_checksums=description.CRC != 0, start=start).values()
            )
    except (zipfile.BadZipFile, StopIteration, NotImplementedError, OverflowError) as error:
        raise ValueError(f"bytes {start:,} to {start + length:,} are not what torch.save writes") from error


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return where a zip member's bytes begin: its own header says how long its name and extra field are."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(info.filename)
    name_and_extra = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.header_offset + len(header) + name_and_extra
