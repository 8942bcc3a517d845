"""Reading untrusted JSON: limited in size and depth, and checked against a schema.

All messages have the same form: the file, the key, and what is wrong with its value.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cogtune.system.errors import CogtuneError
from cogtune.system.json_files import read_json

_SHOWN = 60
"""Maximum number of characters of a wrong value in a message."""

_MOST_PROBLEMS = 20

_WORDS = {
    "missing": "the key is missing",
    "model_type": "input should be an object",
    "dict_type": "input should be an object",
    "list_type": "input should be a list",
    "tuple_type": "input should be a list",
    "int_type": "input should be a whole number",
    "int_from_float": "input should be a whole number",
    "float_type": "input should be a number",
    "bool_type": "input should be true or false",
    "string_type": "input should be text",
    "none_required": "input should be null",
}
"""Messages for pydantic's error types, in terms of JSON instead of Python."""


class Schema(BaseModel):
    """Base of schemas for JSON files: strict types, no NaN or infinity; other keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


S = TypeVar("S", bound=Schema)


def problems_in(value: Any, schema: type[Schema]) -> list[str]:
    """List the problems that keep ``value`` from matching ``schema``, each with its key."""
    try:
        schema.model_validate(value)
    except ValidationError as error:
        return [_told(item) for item in error.errors(include_url=False)[:_MOST_PROBLEMS]]
    return []


def _told(item: ErrorDetails) -> str:
    key = ".".join(str(part) for part in item["loc"])
    kind, message = item["type"], item["msg"]
    words = _WORDS.get(kind, f"{message[0].lower()}{message[1:]}")
    shown = "" if kind == "missing" else f", not {abridged(item['input'])}"
    return f"{key}: {words}{shown}" if key else f"{words}{shown}"


def abridged(value: object) -> str:
    """Format a value for a message; truncate a long one."""
    if isinstance(value, dict | list) and len(value) > _SHOWN:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        CogtuneError: the file is missing, unreadable, not JSON, or not an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CogtuneError(
            f"{path} contains {abridged(value)}, not a JSON object", "restore the file or create it again"
        )
    return value


def read_as(path: Path, schema: type[S], hint: str = "restore the file or create it again") -> S:
    """Return the JSON object in ``path``, checked against ``schema``.

    Raises:
        CogtuneError: as for :func:`read_object`, or with every key whose value does not match the schema.
    """
    value = read_object(path)
    refuse([f"{path}: {problem}" for problem in problems_in(value, schema)], hint)
    return schema.model_validate(value)


def refuse(problems: Iterable[str], hint: str) -> None:
    """Reject a file that has problems.

    Raises:
        CogtuneError: with the problem as its message, or with all problems as its details.
    """
    found = list(problems)
    if len(found) == 1:
        raise CogtuneError(found[0], hint)
    if found:
        raise CogtuneError(f"{len(found)} values are invalid", hint, details=found)
