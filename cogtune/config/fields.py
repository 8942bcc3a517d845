"""How a field of the run's configuration is declared: default, help, panel, and what else is known of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from pydantic.fields import FieldInfo

Tag = Literal["resume", "machine", "reading", "frames", "network", "engine", "untimed"]
"""What is known of a field:

- ``resume``: a resumed run must have the value of its checkpoint
- ``machine``: each machine of a run may have a value of its own
- ``reading``: says how the data is read
- ``frames``: says what is taken of each clip
- ``network``: is about the network, and nobody else's business
- ``engine``: an option of the memory engine; a run that sets none of them does without
- ``untimed``: neither a step's time nor its memory depends on it
"""


def option(default: Any, help_text: str, *, panel: str, tags: tuple[Tag, ...] = (), **limits: Any) -> Any:
    """Return a field with its flag's help and panel; ``limits`` are pydantic's (``ge``, ``lt``, ...)."""
    return Field(default, description=help_text, json_schema_extra={"panel": panel, "tags": list(tags)}, **limits)


def panel_of(field: FieldInfo) -> str:
    """Return the panel of ``--help`` that a field's flag stands in."""
    return str(_extra(field)["panel"])


def tags_of(field: FieldInfo) -> list[Tag]:
    """Return what is known of a field."""
    tags: list[Tag] = _extra(field)["tags"]
    return tags


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)  # option() made it
    return extra
