"""How a configuration field is declared: default, help, panel and tags."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from pydantic.fields import FieldInfo

Tag = Literal["resume", "machine", "reading", "frames", "network", "engine", "stream", "untimed"]
"""A property of a field:

- ``resume``: must have the checkpoint's value in a resumed run
- ``machine``: may differ between the machines of a run
- ``reading``: decides how the data is read
- ``frames``: decides which frames and pixels of each clip are used
- ``network``: describes the network, and is never published
- ``engine``: an option of the memory engine, which is used if any of them is set
- ``stream``: an option of strategy ``stream`` alone
- ``untimed``: affects neither a step's time nor its memory
"""


def option(default: Any, help_text: str, *, panel: str, tags: tuple[Tag, ...] = (), **limits: Any) -> Any:
    """Declare a field with its flag's help and panel; ``limits`` are pydantic's (``ge``, ``lt``, ...)."""
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
