"""The command reference in docs/commands.md, made from the program itself: ``python -m tools.commands_page``."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

import typer

from cogtune.cli.app import app
from cogtune.system import console


def reference() -> str:
    """Return every command with its arguments and options, as Markdown."""
    parts = [
        "# Commands",
        "Made from the program itself by `make docs`. Every command takes `--help`; `--debug` anywhere shows the "
        "traceback of a failure. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.",
    ]
    root = typer.main.get_command(app)
    for name, command in _leaves("cogtune", root):
        parts += [f"## `{name}`", _plain(command.help or "")]
        rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            parts.append("\n".join(["| | |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _leaves(name: str, command: Any) -> list[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if not children:
        return [(name, command)]
    return [leaf for child, node in children.items() for leaf in _leaves(f"{name} {child}", node)]


def _row(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    annotation = parameter.type_descriptor.annotation
    kind = f" {', '.join(get_args(annotation))}" if get_origin(annotation) is Literal else ""
    text = _plain(parameter.help or "")
    if parameter.show_default and parameter.default is not None and "[default:" not in text and not parameter.required:
        shown = parameter.default() if callable(parameter.default) else parameter.default
        if shown is not False:
            text = f"{text} [default: {shown}]"
    return f"| `{', '.join(names)}`{kind} | {text} |"


def _plain(text: str) -> str:
    joined = re.sub(r"[ \t]*\n[ \t]*", "\n", text.strip())
    return joined.replace(r"\[", "[").replace("|", r"\|")


if __name__ == "__main__":
    console.say(reference().rstrip("\n"))
