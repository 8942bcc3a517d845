"""Merging a preset, a file and flags into one configuration, in which each value keeps its source."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cogtune.config.optimizers import OPTIMIZERS, USUAL_RATE
from cogtune.config.presets import PRESETS, preset
from cogtune.config.run_config import RunConfig
from cogtune.system.console import printable
from cogtune.system.errors import CogtuneError, UsageError, did_you_mean
from cogtune.system.files import read_bytes

_YAML_END = "...\n"
"""What PyYAML appends to a document that is a bare scalar."""


def yaml_text(value: Any, **layout: Any) -> str:
    """Return ``value`` as YAML for people: in its own characters, unless some of them would turn the text around."""
    text = str(yaml.safe_dump(value, allow_unicode=True, **layout))
    return text if printable(text) == text else str(yaml.safe_dump(value, **layout))


@dataclass(frozen=True)
class Resolved:
    """A configuration, and for each key where its value came from."""

    config: RunConfig
    provenance: Mapping[str, str]
    momentary: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """The values that others replace for this start only, and their sources, by key."""

    def to_yaml(self) -> str:
        """Return the configuration as ``run.yaml``: every key, each with its source as a comment."""
        lines = ["# The resolved configuration of this run. `cogtune train --config run.yaml` repeats it."]
        for key, value in self.config.to_dict().items():
            lasting, source = self.momentary.get(key, (value, self.provenance[key]))
            text = yaml_text(lasting, default_flow_style=True, width=10_000)
            lines.append(f"{key}: {text.removesuffix(_YAML_END).strip()}  # {source}")
        return "\n".join(lines) + "\n"


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also rejects duplicate keys and aliases.

    Nested aliases grow exponentially, and a configuration needs none.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not supported; write the value out", mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                said = f"duplicate key {key.value}, first in line {lines[key.value] + 1}"
                raise yaml.composer.ComposerError(None, None, said, key.start_mark)
            lines[key.value] = key.start_mark.line
        return node


MOST_YAML = 1 << 20
"""Maximum size of a YAML file in bytes; a run's own has 3 KB."""


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the keys and values in a YAML file.

    Raises:
        UsageError: it is a folder, not UTF-8, not YAML, or not a mapping; a key is there twice, or aliases are.
        CogtuneError: it cannot be read, or is no ordinary file.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a YAML file", f"a run's configuration is {path / 'run.yaml'}")
    data = read_bytes(path, MOST_YAML)
    try:
        value = yaml.load(data.decode("utf-8-sig"), Loader)
        json.dumps(value, default=str, ensure_ascii=False).encode()  # half a character can be read, never written
    except RecursionError as error:
        raise UsageError(f"{path} is not valid YAML: nested too deeply") from error
    except UnicodeEncodeError as error:
        raise UsageError(f"{path} is not valid YAML: it contains a lone surrogate ({error.reason})") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path} line {line} is not UTF-8 text", "save the file as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(
            f"{path} contains a {type(value).__name__}, not keys and values", "write lines like `rank: 64`"
        )
    return {str(key): item for key, item in value.items()}


def _layers(
    preset_name: str | None, file: Path | None, flags: Mapping[str, Any]
) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Return ``(source, values)`` in increasing priority, and the problems found."""
    problems: list[str] = []
    layers: list[tuple[str, dict[str, Any]]] = []
    from_file = read_mapping(file) if file is not None else {}
    named = from_file.pop("preset", None)
    chosen = preset_name or (str(named) if named is not None else None)
    if chosen is not None:
        try:
            layers.append((f"preset {chosen}", preset_values(chosen)))
        except UsageError as error:
            problems.append(f"preset: {error.message}")
    if file is not None:
        layers.append((str(file), from_file))
    layers.append(("flag", dict(flags)))
    return layers, problems


_YAML_NAMES = (".yaml", ".yml")


def preset_values(name: str) -> dict[str, Any]:
    """Return the keys that a preset sets: a built-in one, one of the user's own, or a YAML file.

    Raises:
        UsageError: the preset does not exist, or the file is not a mapping.
        CogtuneError: the file cannot be read.
    """
    path = Path(name)
    if path.suffix in _YAML_NAMES:
        return read_mapping(path)
    mine = user_presets()
    if name in mine and name not in PRESETS:
        return read_mapping(mine[name])
    return preset(name, mine).values()


def user_presets() -> dict[str, Path]:
    """List the user's presets by name: YAML files in ``~/.config/cogtune/presets`` (or in ``$XDG_CONFIG_HOME``)."""
    configs = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    found = (path for path in (configs / "cogtune" / "presets").glob("*") if path.suffix in _YAML_NAMES)
    return {path.stem: path for path in sorted(found)}


_WORDS = {
    "path_type": "input should be a path",
    "tuple_type": "input should be a list of names",
    "too_short": "input should be a list of names",
    "int_type": "input should be a whole number",
    "int_parsing": "input should be a whole number",
    "int_from_float": "input should be a whole number",
    "float_type": "input should be a number",
    "float_parsing": "input should be a number",
    "bool_type": "input should be true or false",
    "bool_parsing": "input should be true or false",
    "string_type": "input should be text",
}
"""User-facing messages for pydantic's error types."""


def _in_words(item: ErrorDetails) -> str:
    if item["type"] == "value_error":  # one of ours, which names the value itself
        return str(item["ctx"]["error"])
    message = _WORDS.get(item["type"], item["msg"])
    return f"{message[0].lower()}{message[1:]}, not {item['input']!r}"


_EITHER = (("steps", "epochs"), ("size", "buckets"), ("frames", "buckets"))
"""Pairs of keys that cannot be used together."""

_IN_PLACE_OF = (
    ("steps", "epochs"),
    ("size", "frames"),
    ("size", "buckets"),
    ("buckets", "size"),
    ("buckets", "frames"),
)
"""Keys that override another key given with lower priority."""


def resolve(
    *, preset_name: str | None = None, file: Path | None = None, flags: Mapping[str, Any] | None = None
) -> Resolved:
    """Merge defaults, preset, file and flags into one configuration.

    Args:
        preset_name: a preset's name, or a YAML file of the same keys; the file's ``preset`` key when None.
        file: a YAML file of :class:`RunConfig` keys.
        flags: values given on the command line, by field name; only those that were given.

    Raises:
        UsageError: unknown keys, wrong values, an unknown preset: all of them at once.
        CogtuneError: a file cannot be read.
    """
    layers, problems = _layers(preset_name, file, flags or {})
    fields = RunConfig.model_fields
    values: dict[str, Any] = {}
    provenance = dict.fromkeys(fields, "default")
    for one, other in _EITHER:
        if flags and {one, other} <= flags.keys():
            problems.append(f"--{one} cannot be used with --{other}")
    for source, layer in layers:
        before = values.get("optimizer")
        for key, value in layer.items():
            if key == "preset":
                problems.append(f"preset: a preset cannot extend another preset; pass this file as --config ({source})")
                continue
            if key not in fields:
                problems.append(f"{key}: unknown key{did_you_mean(key, fields)} ({source})")
                continue
            values[key] = value
            no = "no-" if value is False else ""
            provenance[key] = source if source != "flag" else f"--{no}{key.replace('_', '-')}"
        if "optimizer" in layer and "learning_rate" not in layer:
            usual = _default_learning_rate(layer["optimizer"])
            if usual != _default_learning_rate(before):
                values["learning_rate"], provenance["learning_rate"] = usual, provenance["optimizer"]
        for key, weaker in _IN_PLACE_OF:
            if key in layer and weaker not in layer and values.get(weaker):
                values[weaker] = fields[weaker].default
                provenance[weaker] = provenance[key]
    if file is not None and provenance["vram"] == str(file):
        text = read_bytes(file, MOST_YAML).decode("utf-8-sig")
        written = sources_in(text).get("vram", "")
        provenance["vram"] = written if is_of_preset(written, values["vram"]) else provenance["vram"]
    if not _has_engine(values) and is_of_preset(provenance["vram"], values.get("vram")):  # it trains in another way
        values.pop("vram")
        provenance["vram"] = "default"
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = str(item["loc"][0])
            problems.append(f"{key}: {_in_words(item)} ({provenance[key]})")
        config = None
    if config is None or problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        raise UsageError(f"{count} in the configuration", "see `cogtune train --help` for all keys", details=problems)
    return Resolved(config, provenance)


def sources_in(text: str) -> dict[str, str]:
    """Return where each value of a ``run.yaml`` came from, as the comments behind them say."""
    node = yaml.compose(text, Loader)
    sources = {}
    for key, value in node.value if node is not None else ():
        behind = text[value.end_mark.index :].partition("\n")[0].strip()
        if behind.startswith("# "):
            sources[str(key.value)] = behind[2:]
    return sources


def is_of_preset(source: str, vram: Any) -> bool:
    """Return whether ``vram`` is a preset's own: its source says so, and the value was not edited since."""
    name = source.removeprefix("preset ")
    try:
        return name != source and preset_values(name).get("vram") == vram
    except CogtuneError:  # a preset of one's own that is gone
        return False


def _has_engine(values: Mapping[str, Any]) -> bool:
    """Return whether the memory engine can run what is asked for, as :attr:`RunConfig.may_use_engine` says later."""
    strategy, kind = (values.get(key, RunConfig.model_fields[key].default) for key in ("strategy", "type"))
    return bool(strategy == "stream" or (strategy == "ddp" and kind == "lora"))


def _default_learning_rate(optimizer: Any) -> float:
    return next((facts.default_learning_rate for name, facts in OPTIMIZERS.items() if name == optimizer), USUAL_RATE)
