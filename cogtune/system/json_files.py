"""JSON files: limited in size and depth, and sealed with a checksum if cogtune wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogtune.system.digests import digest
from cogtune.system.errors import CogtuneError
from cogtune.system.files import read_bytes, write_text


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


MOST_JSON = 1 << 28
"""Maximum size in bytes of a JSON file; a list of half a million samples is smaller."""


def read_json(path: Path) -> Any:
    """Return the JSON value in ``path``.

    Raises:
        CogtuneError: the file is missing, unreadable, too large, or not JSON.
    """
    data = read_bytes(path, MOST_JSON)
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise CogtuneError(f"{path} is not valid JSON: {error}", _RESTORE) from error


def parse_json(text: str) -> Any:
    """Return the JSON value in a text that anyone may have written.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or contains a lone surrogate.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _is_deep(value):
        raise ValueError("nested too deeply")
    if "\\ud" in text.lower():  # a lone surrogate can be read, but not written
        json.dumps(value, ensure_ascii=False).encode()
    return value


_RESTORE = "restore the file or create it again"


CHECKSUM = "checksum"
"""The key that holds the digest of all other keys, in a JSON object written by cogtune."""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``value`` with its checksum added, to save as JSON."""
    return {**value, CHECKSUM: _checksum(value)}


def is_sealed(value: Any) -> bool:
    """Return whether a JSON value is an object that still matches its checksum."""
    return isinstance(value, dict) and value.get(CHECKSUM) == _checksum(value)


def _checksum(value: Mapping[str, Any]) -> str:
    own = {key: item for key, item in value.items() if key != CHECKSUM}
    return digest(json.loads(json.dumps(own)))  # keys and lists as they come back from a file


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as JSON with its checksum, for :func:`read_sealed`."""
    write_json(path, sealed(value))


def read_sealed(path: Path, hint: str = _RESTORE) -> dict[str, Any]:
    """Return the object that :func:`write_sealed` wrote to ``path``.

    Args:
        hint: what to do if it was changed.

    Raises:
        CogtuneError: the file is missing, unreadable, or was changed since.
    """
    value = read_json(path)
    if not is_sealed(value):
        raise CogtuneError(f"{path} is damaged: checksum mismatch", hint)
    return {key: item for key, item in value.items() if key != CHECKSUM}


_MOST_LEVELS = 64


def _is_deep(value: Any) -> bool:
    """Return whether lists and objects are nested more deeply than in any file of cogtune or of a model."""
    boxes = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_LEVELS):
        items = (item for box in boxes for item in (box.values() if isinstance(box, dict) else box))
        boxes = [item for item in items if isinstance(item, dict | list)]
        if not boxes:
            return False
    return True
