"""Commands that refuse an option given twice, of which the last one would count without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from cogtune.system.errors import UsageError


def _refuse_twice(command: Any, context: Any, words: list[str]) -> None:
    """See that every option that takes one value is given once.

    Raises:
        UsageError: with all that are not.
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
            "give each once: of several, only the last would count",
        )


class SingleOptionCommand(TyperCommand):
    """A command whose options are given once, but for those that take several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Click does, after a look at what is given twice."""
        _refuse_twice(self, ctx, args)
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


class SingleOptionGroup(TyperGroup):
    """A group of commands of which the same holds for its own options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Click does, after a look at what is given twice."""
        _refuse_twice(self, ctx, args)
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


class Commands(typer.Typer):
    """A Typer app all of whose commands are of these kinds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=SingleOptionGroup, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        """As Typer's, with the class of the command filled in."""
        return super().command(name, **{"cls": SingleOptionCommand, **settings})
