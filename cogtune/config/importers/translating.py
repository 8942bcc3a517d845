"""Translation of another program's flags into a cogtune configuration, with a remark on each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cogtune.config.importers.flags import BETTER, DEFAULTS, KEPT, KNOWN, LAUNCH_KNOWN, NOTHING
from cogtune.config.importers.reading import Given
from cogtune.config.run_config import RunConfig
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.system.errors import UsageError, did_you_mean

Kind = Literal["kept", "better", "none", "to do"]
"""Of a remark: the flag became a key; it is not needed; it has no counterpart; the user has something to do."""

_SECRET = ("hub_token",)


@dataclass(frozen=True)
class Remark:
    """What became of a flag."""

    flag: str
    value: str
    kind: Kind
    text: str


@dataclass
class Imported:
    """A configuration in the making."""

    given: Given
    spec: ModelSpec | None = None
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    def words(self, flag: str) -> list[str] | None:
        """Return a flag's values, or its program's default; None if there is neither."""
        found = self.given.flags.get(flag)
        return found if found is not None else DEFAULTS[self.given.program].get(flag)

    def word(self, *flags: str) -> str | None:
        """Return the first value of the first of ``flags`` that has one; given flags take precedence over defaults."""
        for of in (self.given.flags, DEFAULTS[self.given.program]):
            for flag in flags:
                if words := of.get(flag):
                    return words[0]
        return None

    def number(self, flag: str) -> float | None:
        """Return a flag's number; None if it has no value. Anything else is recorded as a problem."""
        word = self.word(flag)
        if word is None:
            return None
        try:
            value = float(word)
        except ValueError:
            self.problems.append(f"--{flag} {word}: expected a number")
            return None
        return int(value) if value.is_integer() else value

    def has(self, flag: str) -> bool:
        """Return whether a flag is given."""
        return flag in self.given.flags

    def on(self, flag: str) -> bool:
        """Return whether a switch is given and not false."""
        words = self.given.flags.get(flag)
        return words is not None and (not words or words[0].lower() in ("true", "1", "yes"))

    def say(self, flag: str, kind: Kind, text: str) -> None:
        """Add a remark on what became of a flag."""
        self.told.add(flag)
        words = self.given.flags.get(flag)
        value = " ".join(words) if words is not None else f"({' '.join(self.words(flag) or [])}, its default)"
        shown = "***" if flag in _SECRET and words else value if len(value) <= 80 else f"{value[:77]}..."
        self.remarks.append(Remark(f"--{flag}", shown, kind, text))

    def set(self, key: str, value: Any, flag: str, note: str = "") -> None:
        """Set a key to a value from a flag."""
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip()
        self.values[key] = value
        source = f"--{flag}" if self.has(flag) or flag not in DEFAULTS[self.given.program] else f"default of --{flag}"
        self.sources[key] = f"{source} of {self.given.program}"
        shown = text.removesuffix("\n...") if len(text) <= 80 else f"{text[:77]}..."
        self.say(flag, "kept", f"{key}: {shown}" + (f"; {note}" if note else ""))

    def drop(self, key: str) -> None:
        """Remove a key."""
        self.values.pop(key, None)
        self.sources.pop(key, None)

    def to_yaml(self) -> str:
        """Return the keys as YAML in cogtune's order, each with the flag that it comes from."""
        lines = [f"# Imported from {self.given.path.name} of {self.given.program} by `cogtune import`."]
        for key in RunConfig.model_fields:
            if key in self.values:
                text = yaml.safe_dump(self.values[key], default_flow_style=True, width=10_000, allow_unicode=True)
                lines.append(f"{key}: {text.removesuffix('...' + chr(10)).strip()}  # {self.sources[key]}")
        return "\n".join(lines) + "\n"


def translate(given: Given, *, leave_out: Iterable[str] = ()) -> Imported:
    """Return the configuration that a script asks for.

    Args:
        leave_out: unknown flags to ignore.

    Raises:
        UsageError: flags are unknown or cannot be translated; lists all of them.
    """
    from cogtune.config.importers import flag_groups

    made = Imported(given)
    skipped = {name.lstrip("-").replace("-", "_") for name in leave_out}
    for name in [name for name in given.flags if name not in KNOWN]:
        if name in skipped:
            made.say(name, "none", "ignored because of --leave-out")
        else:
            made.problems.append(f"--{name}: unknown flag of {given.program}{did_you_mean(name, KNOWN)}")
    for name in (name for name in given.launch if name not in LAUNCH_KNOWN):
        if name in skipped:
            made.remarks.append(
                Remark(f"launcher --{name}", " ".join(given.launch[name]), "none", "ignored because of --leave-out")
            )
        else:
            made.problems.append(f"--{name}: unknown flag of the launcher")
    if surplus := sorted(skipped - given.flags.keys() - given.launch.keys()):
        made.problems.append(f"--leave-out {', '.join(surplus)}: the script has no such flag")
    _evaluate(made)
    for told in given.remarks:
        made.remarks.append(Remark("script", "", "to do", told))
    for file in given.files:
        made.remarks.append(Remark("script", str(file), "kept", "its keys are imported, too"))
    _refuse(made)
    flag_groups.model(made)
    _plain(made)
    for group in flag_groups.ALL:
        group(made)
    for name, words in given.launch.items():
        if LAUNCH_KNOWN.get(name) == "":
            text = "cogtune connects the processes itself"
            made.remarks.append(Remark(f"launcher --{name}", " ".join(words), "better", text))
    lost = [name for name in given.flags if name in KNOWN and name not in made.told]
    made.problems += [f"--{name}: not translated, which is a bug in `cogtune import`" for name in lost]
    _refuse(made)
    return made


def _refuse(made: Imported) -> None:
    """Raise if there are problems.

    Raises:
        UsageError: with every problem.
    """
    if made.problems:
        raise UsageError(
            f"{made.given.path} cannot be imported as is",
            "use --leave-out FLAG to ignore an unknown flag, or edit the script",
            details=made.problems,
        )


def _evaluate(made: Imported) -> None:
    """Report flags whose values only running the script would give; an output folder is replaced."""
    for name, words in made.given.flags.items():
        found = [text for text in sorted(made.given.unknown) if any(text in word for word in words)]
        if found and name == "output_dir":
            made.given.flags[name] = ["out"]
            made.remarks.append(
                Remark(f"--{name}", " ".join(words), "to do", "output: out, since the script computes it")
            )
        elif found and name in KNOWN and name not in BETTER and name not in NOTHING:
            told = ", ".join(found)
            made.problems.append(
                f"--{name} {' '.join(words)}: {told} is set neither in the script nor in the environment"
            )


def _plain(made: Imported) -> None:
    """Translate the flags that need no others."""
    for name in (*made.given.flags, *(n for n in DEFAULTS[made.given.program] if n not in made.given.flags)):
        if name in BETTER:
            made.say(name, "better", BETTER[name])
        elif name in NOTHING:
            made.say(name, "none", NOTHING[name])
        elif name in KEPT and (words := made.words(name)):
            if made.has(name) or not _given_otherwise(made, name):
                made.set(KEPT[name], _value(words), name)
        elif name in KEPT:
            made.problems.append(f"--{name} has no value")


def _given_otherwise(made: Imported, name: str) -> bool:
    """Return whether another flag sets the same key."""
    return any(other in made.given.flags for other, key in KEPT.items() if key == KEPT[name])


def _value(words: Sequence[str]) -> Any:
    """Return words as one value, a number if they are one."""
    text = " ".join(words)
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and not set(text) & set(".eE") else number


def existing(name: str) -> bool:
    """Return whether a path exists on this machine."""
    return Path(name).expanduser().exists()
