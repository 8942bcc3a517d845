"""Weights written as safetensors, a few MB in memory at a time, and read back to prove them.

The safetensors library writes from whole tensors in memory; its format is a length, a JSON header and the raw
bytes, so that writing it in a stream needs little more than the header. Reading back is the library's.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cogtune.merge.archive import CHUNK_BYTES
from cogtune.merge.sources import Values
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.files import os_errors_explained

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

_DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Output:
    """A tensor to be written: where its values are, and the type they get."""

    source: Values
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes it takes in the file."""
        return self.source.numel * self.dtype.itemsize


def parse_size(size: str | int) -> int:
    """Return bytes of a size such as ``5GB`` (10^9), ``500MiB`` (2^20) or a plain number.

    Raises:
        UsageError: it is not a size, or is less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    value = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if value < 1:
        raise UsageError(f"'{size}' is not a size", "write a number and a unit, such as 5GB or 500MiB")
    return int(value)


def split(tensors: Mapping[str, Output], limit: int) -> list[dict[str, Output]]:
    """Return ``tensors`` in order, cut into shards of at most ``limit`` bytes; a larger tensor gets its own."""
    shards: list[dict[str, Output]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.size
    return shards


@dataclass(frozen=True)
class Written:
    """What is known of a tensor from writing it: the CRC-32 of its bytes, the sum of its values' squares."""

    crc: int
    square: float


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in this thread alone: pieces of a few MB take longer to share out than to work on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_safetensors(
    path: Path, tensors: Mapping[str, Output], metadata: Mapping[str, str], on_bytes: Callable[[int], None]
) -> tuple[dict[str, Written], list[str]]:
    """Write ``tensors`` to ``path``; tells ``on_bytes`` how many bytes of the sources were read.

    Returns:
        What was written, and the problems: tensors that are not finite.

    Raises:
        CogtuneError: the file cannot be written.
    """
    # types of wider elements first, so that every tensor is aligned in the file
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in ordered.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.source.shape,
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    written: dict[str, Written] = {}
    problems = []
    wide = torch.empty(CHUNK_BYTES, dtype=torch.float64)
    with os_errors_explained(path), path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in ordered.items():
            crc, total = 0, 0.0
            faults = set()
            for chunk in tensor.source.chunks():
                cast = chunk.to(tensor.dtype)
                doubles = wide[: cast.numel()].copy_(cast)
                square = float(torch.dot(doubles, doubles))
                if not math.isfinite(square):
                    faults.add("that are not finite" if not chunk.isfinite().all() else f"too large for {tensor.dtype}")
                data = cast.view(torch.uint8).numpy().data
                crc, total = zlib.crc32(data, crc), total + square
                file.write(data)
                on_bytes(chunk.nbytes)
            written[name] = Written(crc, total)
            problems += [f"{name} has values {fault}" for fault in sorted(faults)]
    return written, problems


def check_safetensors(path: Path, tensors: Mapping[str, Output], written: Mapping[str, Written]) -> list[str]:
    """Read ``path`` back: what differs from ``tensors`` in keys, types, shapes or bytes, as problems."""
    problems = []
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            for name in sorted(found ^ set(tensors)):
                problems.append(f"{path.name} {'also has' if name in found else 'lacks'} {name}")
            for name in sorted(found & set(tensors)):
                tensor = file.get_tensor(name)
                if tensor.dtype != tensors[name].dtype or tuple(tensor.shape) != tensors[name].source.shape:
                    problems.append(f"{path.name}: {name} came back as {tensor.dtype} {tuple(tensor.shape)}")
                elif zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) != written[name].crc:
                    problems.append(f"{path.name}: {name} came back with other values")
    except SafetensorError as error:
        raise CogtuneError(f"{path.name} cannot be read back: {error}", "check the disk") from error
    return problems
