"""Commands that reject an option given twice, where Click would silently use the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from cogtune.system.errors import UsageError


def _refuse_twice(command: Any, context: Any, words: list[str]) -> None:
    """Reject single-valued options that are given more than once.

    Raises:
        UsageError: with all of them.
    """
    _, _, order = command.make_parser(context).parse_args(args=list(words))
    counts = Counter(id(param) for param in order)
    twice = [
        param
        for param in dict.fromkeys(order)
        if counts[id(param)] > 1 and param.param_type_name == "option" and not (param.multiple or param.count)
    ]
    if twice:
        raise UsageError(
            f"given more than once: {', '.join(param.opts[0] for param in twice)}",
            "pass each of them once",
        )


class SingleOptionCommand(TyperCommand):
    """A command whose single-valued options may be given only once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as Click does, and reject repeated options."""
        _refuse_twice(self, ctx, args)
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


class SingleOptionGroup(TyperGroup):
    """A command group whose single-valued options may be given only once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as Click does, and reject repeated options."""
        _refuse_twice(self, ctx, args)
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


class Commands(typer.Typer):
    """A Typer app whose commands reject repeated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=SingleOptionGroup, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        """Register a command as Typer does, with :class:`SingleOptionCommand` as its class."""
        return super().command(name, **{"cls": SingleOptionCommand, **settings})
