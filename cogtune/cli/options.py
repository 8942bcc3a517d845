"""Flags made from the fields of :class:`RunConfig`: a key, its flag, its default and its help are defined once."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from cogtune.config.choices import DECODER_VARIABLE, Decoder
from cogtune.config.fields import panel_of
from cogtune.config.run_config import RunConfig

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset", help="Preset to start from: a name listed by `cogtune presets`, or a YAML file of your own."
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of settings. Overrides the preset; flags override it."),
]

Fit = Annotated[
    bool,
    typer.Option("--fit", help="Use all GPUs of this machine and the fastest strategy that is estimated to fit."),
]

ClipDecoder = Annotated[
    Decoder | None,
    typer.Option(
        "--decoder",
        help=r"What reads clips: PyAV, decord, or whichever is faster for each clip; frames are the same with each. "
        rf"\[default: {DECODER_VARIABLE}, or auto]",
        show_default=False,
        rich_help_panel="Data",
    ),
]


def use_decoder(decoder: Decoder | None) -> None:
    """Make this process, and those that it starts, read clips with the given decoder, if any."""
    if decoder is not None:
        os.environ[DECODER_VARIABLE] = decoder


def _flag(name: str, *, first: bool = False) -> tuple[Any, typer.models.OptionInfo]:
    """Return a configuration field's type and Typer option; ``first`` puts it in the top panel of ``--help``."""
    field = RunConfig.model_fields[name]
    kind: Any = field.annotation
    if get_origin(kind) is tuple:
        kind = list[str]
    elif type(None) in get_args(kind):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    help_text = str(field.description)
    if "[default:" not in help_text and field.default not in ("", None, ()):
        shown = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        if isinstance(shown, bool):
            shown = "on" if shown else "off"
        help_text = f"{help_text} [default: {shown}]"
    option = typer.Option(
        help=help_text.replace("[default:", r"\[default:"),
        rich_help_panel=None if first else panel_of(field),
        show_default=False,
    )
    return kind | None, option


def with_config_flags(*names: str, first: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a flag for each named field to a command, which receives those that were passed as the mapping ``flags``.

    Args:
        first: fields shown in the top panel of ``--help``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "flags"]
        flags = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
            for name in names
            for kind, option in [_flag(name, first=name in first)]
        ]

        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            command(**values, flags={name: value for name, value in given.items() if value not in (None, [])})

        run.__doc__ = command.__doc__
        run.__name__ = command.__name__
        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature([*keyword_only, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *flags)}
        return run

    return decorate


Flags = Mapping[str, Any]
