"""Damages to files, drawn from a seed: flipped and cut bytes, values of another type, deep nesting, huge numbers."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

DEEP = "[" * 100_000 + "]" * 100_000

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    10**15,
    10**400,
    float("inf"),
    float("nan"),
    "x",
    "",
    "../../elsewhere",
    "\ud800",
    "a\x00b",
    "x" * 100_000,
    [],
    {},
    [[]],
    [None] * 100,
    {"a": {"b": []}},
    "DEEP",
)


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_early(data: bytes, rng: random.Random) -> bytes:
    head = min(len(data), 512)
    return _flip(data[:head], rng) + data[head:]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))] if data else data


def _empty(_data: bytes, _rng: random.Random) -> bytes:
    return b""


def _longer(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 2000))


def _zeros(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data)) if data else 0
    return data[:start] + b"\0" * (len(data) - start)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value[:20]):
            yield from _places(item, (*path, number))


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value[path[0]] = _with(value[path[0]], path[1:], new)
    return value


def _in_value(value: Any, rng: random.Random) -> Any:
    """One place of a JSON value exchanged, or taken out."""
    path = rng.choice([place for place in _places(value) if len(place) <= 3])
    if path and rng.random() < 0.15:
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return value
    return _with(value, path, rng.choice(VALUES))


def _spelled(value: Any) -> bytes:
    return json.dumps(value).replace('"DEEP"', DEEP).encode()


def _json(data: bytes, rng: random.Random) -> bytes:
    return _spelled(_in_value(json.loads(data), rng))


def _json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = _json(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def _yaml(data: bytes, rng: random.Random) -> bytes:
    """JSON is YAML too."""
    return _spelled(_in_value(yaml.safe_load(data), rng))


def _header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = _spelled(_in_value(json.loads(data[8 : 8 + length]), rng))
    size = len(header) if rng.random() < 0.9 else rng.choice([0, 2**40, 2**63, len(data)])
    return struct.pack("<Q", size) + header + data[8 + length :]


def _stamp(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another text in its metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__") or {"format": "pt"}
    key = rng.choice(sorted(metadata))
    try:
        metadata[key] = _json(metadata[key].encode(), rng).decode()
    except ValueError:
        metadata[key] = rng.choice(["", "x", "[]", "5", DEEP])
    header["__metadata__"] = metadata
    spelled = json.dumps(header).encode()
    return struct.pack("<Q", len(spelled)) + spelled + data[8 + length :]


def _text(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    odd = (b"", b"\xff\xfe\x00", b"a\x00b", b"../../elsewhere.mp4", b"/etc/passwd", b"x" * 100_000, b"\xed\xa0\x80")
    lines[number] = rng.choice(odd)
    return b"\n".join(lines)


Damage = Callable[[bytes, random.Random], bytes]

_BYTES: tuple[Damage, ...] = (_flip, _flip_early, _cut, _empty, _longer, _zeros)


def kinds_for(path: Path) -> tuple[Damage, ...]:
    """The damages that a file can have; those of its own format count for more."""
    own: dict[str, tuple[Damage, ...]] = {
        ".json": (_json,) * 8,
        ".jsonl": (_json_lines,) * 4,
        ".yaml": (_yaml,) * 6,
        ".safetensors": (_header, _stamp) * 3,
        ".txt": (_text,) * 6,
    }
    return (*_BYTES, *own.get(path.suffix, ()))


def damaged(path: Path, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The name of a damage and the file's bytes with it; never the same bytes."""
    while True:
        kind = rng.choice(kinds_for(path))
        new = kind(data, rng)
        if new != data:
            return kind.__name__.strip("_"), new
