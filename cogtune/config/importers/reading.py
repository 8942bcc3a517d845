"""Reading of another program's script or configuration: its flags, and how it is launched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cogtune.config.importers.shell import Command, follow
from cogtune.config.resolving import read_mapping
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.files import read_bytes
from cogtune.system.json_files import read_json

Program = Literal["CogVideo", "CogKit", "diffusers", "CogVideoX Factory", "finetrainers"]

_YAML = (".yaml", ".yml")
_LAUNCHERS = ("accelerate", "torchrun", "python", "python3", "deepspeed")
_ABOVE = 8
"""Parent folders of a script in which files are searched: it may be started from any of them."""

_MOST_SCRIPT = 1 << 17
"""Bytes of the longest shell script that is read."""

_CONFIG_FLAGS = ("yaml", "config")
_OF_A_SCRIPT = "pass the shell script that starts the training, or CogKit's config.yaml"


@dataclass
class Given:
    """Flags of a script or configuration, before translation."""

    path: Path
    program: Program
    script: str
    """The training script's name, empty if there is none."""
    flags: dict[str, list[str]]
    """The values of each flag, by its name with underscores; empty for a switch."""
    launch: dict[str, list[str]] = field(default_factory=dict)
    """The same for the launcher."""
    devices: str | None = None
    """``CUDA_VISIBLE_DEVICES`` as the script sets it."""
    unknown: frozenset[str] = frozenset()
    """Placeholders in values for what is unknown."""
    remarks: list[str] = field(default_factory=list)
    """Remarks on the script as a whole."""
    files: list[Path] = field(default_factory=list)
    """Other files that were read."""

    def file(self, name: str) -> Path | None:
        """Return the file that a flag names, relative to the working folder, the script's folder or one above it."""
        places = (Path(), *self.path.absolute().parents[:_ABOVE])
        return next((place / name for place in places if (place / name).is_file()), None)


def read(path: Path, environment: Mapping[str, str] | None = None) -> Given:
    """Return what the script or configuration in ``path`` asks for.

    Raises:
        UsageError: it starts no training or several, or its program is not supported.
        CogtuneError: it cannot be read.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder", _OF_A_SCRIPT)
    if path.suffix in _YAML or path.suffix == ".json":
        values = read_mapping(path) if path.suffix in _YAML else read_json(path)
        if not isinstance(values, dict):
            raise UsageError(f"{path} is not a mapping of keys to values", _OF_A_SCRIPT)
        flags = as_flags(values)
        return Given(path, _program(path, "", flags), "", flags)
    data = read_bytes(path, _MOST_SCRIPT)
    try:
        script = follow(data.decode("utf-8-sig"), str(path), environment)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file", _OF_A_SCRIPT) from error
    found = [split for command in script.commands if (split := _training(command)) is not None]
    if not found:
        raise UsageError(f"{path} does not start a training: it has no command with a .py file and flags", _OF_A_SCRIPT)
    if len(found) > 1:
        lines = ", ".join(str(command.line) for command, *_ in found)
        raise UsageError(f"{path} starts {len(found)} trainings, on lines {lines}", "keep one of them")
    _, name, launch, flags = found[0]
    devices = script.variables.get("CUDA_VISIBLE_DEVICES")
    given = Given(
        path,
        "CogVideo",
        name,
        flags,
        launch,
        devices if isinstance(devices, str) else None,
        frozenset(script.unknown),
        script.remarks,
    )
    _add_config(given)
    given.program = _program(path, name, given.flags)
    return given


def _training(command: Command) -> tuple[Command, str, dict[str, list[str]], dict[str, list[str]]] | None:
    """Return the script that a command runs, and the flags before and after it; None for any other command."""
    words = list(command.words)
    at = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
    if at is None or not any(word.startswith("--") for word in words[at:]):
        return None
    if not any(Path(word).name in _LAUNCHERS for word in words[:at]):
        return None
    return command, Path(words[at]).name, parse(words[:at]), parse(words[at + 1 :])


def parse(words: Sequence[str]) -> dict[str, list[str]]:
    """Return flags with their values; the last wins if a flag is repeated, as in argparse."""
    flags: dict[str, list[str]] = {}
    name = None
    for word in words:
        if match := re.fullmatch(r"--([A-Za-z][\w-]*)(?:=(.*))?", word, re.DOTALL):
            name = match[1].replace("-", "_")
            flags[name] = [] if match[2] is None else [match[2]]
        elif name is not None:
            flags[name].append(word)
    return flags


def as_flags(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return a file's keys as flags, without those that have no value."""
    flags: dict[str, list[str]] = {}
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict):
            raise UsageError(f"{key} holds nested keys, so this is not a training configuration", _OF_A_SCRIPT)
        items = value if isinstance(value, list) else [value]
        flags[key] = [str(item).lower() if isinstance(item, bool) else str(item) for item in items]
    return flags


def _add_config(given: Given) -> None:
    """Add the keys of the config file that CogKit's command names; the command's own flags take precedence."""
    for flag in _CONFIG_FLAGS:
        words = given.flags.get(flag)
        if words and Path(words[0]).suffix in _YAML:
            file = given.file(words[0])
            if file is None:
                raise CogtuneError(f"--{flag} {words[0]}: no such file", "import the script on the machine that has it")
            own = {name: value for name, value in given.flags.items() if name != flag}
            given.flags = as_flags(read_mapping(file)) | own
            given.files.append(file)
            return


def _program(path: Path, script: str, flags: Mapping[str, list[str]]) -> Program:
    """Tell whose script this is, by the training script's name and by flags that only one program has."""
    if re.fullmatch(r"cogvideox_(text|image)_to_video_(lora|sft)\.py", script):
        return "CogVideoX Factory"
    if re.fullmatch(r"train_cogvideox_(image_to_video_)?lora\w*\.py", script) or "instance_data_root" in flags:
        return "diffusers"
    if "pretrained_model_name_or_path" in flags:
        if "height_buckets" in flags or "max_num_frames" in flags:
            return "CogVideoX Factory"
        return "finetrainers"
    if "model_path" in flags:
        return "CogVideo" if "caption_column" in flags or "video_column" in flags else "CogKit"
    known = "CogVideo's finetune, CogKit, the diffusers example, CogVideoX Factory and finetrainers"
    raise UsageError(f"{path} is not from a supported program: it names no model", f"supported are {known}")
