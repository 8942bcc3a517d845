"""What weights say of the run that made them, in a LoRA file, a checkpoint, or the record of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field

from cogtune.models.geometry import Size
from cogtune.models.variants import Precision
from cogtune.system.reading import Schema, problems_in, refuse


def _size(text: str) -> str:
    Size.parse(text)
    return text


def _without_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("input should be text without a null character")
    return text


_Text = Annotated[str, AfterValidator(_without_null)]


class RunFacts(Schema):
    """What sampling and editing go by; any of it may be missing."""

    base_model: _Text | None = None
    model_path: _Text | None = None
    size: Annotated[str, AfterValidator(_size)] | None = None
    fps: Annotated[float, Field(ge=0.01, le=1000)] | None = None
    precision: Precision | None = None
    prompt: _Text | None = None
    id_token: _Text | None = None


F = TypeVar("F", bound=Mapping[str, Any])


def checked_facts(facts: F, source: Path | str) -> F:
    """Return what was read in ``source``.

    Raises:
        CogtuneError: a value is none that cogtune writes.
    """
    problems = problems_in(facts, RunFacts)
    refuse([f"{source}: {problem}" for problem in problems], "copy or download it again, or save it again")
    return facts
