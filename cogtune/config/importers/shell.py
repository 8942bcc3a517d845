"""The commands that a shell script runs, with variables expanded. Nothing is executed.

Supports what training scripts use: variables, arrays, quotes, ``for`` over a list (its first value is used), ``if``
with comparisons, ``eval``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cogtune.config.importers.shell_words import Part, Token, tokens
from cogtune.system.errors import UsageError
from cogtune.system.secrets import is_secret

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?=)(.*)", re.DOTALL)
_BUILTINS = ("export", "declare", "local", "readonly", "typeset")
_NOT_UNDERSTOOD = ("while", "until", "case", "select", "function")
_TOO_DEEP = 20
_MOST_TEXT = 1 << 22
"""Characters that all words of a script may expand to: variables that contain each other grow exponentially."""


@dataclass(frozen=True)
class Command:
    """A command's words, as the program receives them."""

    words: tuple[str, ...]
    line: int


@dataclass
class Script:
    """A script's commands and variables."""

    commands: list[Command] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    """Placeholders left in words for unknown values."""
    variables: dict[str, str | list[str]] = field(default_factory=dict)
    expanded: int = 0
    """Characters that words have expanded to so far."""


def follow(text: str, name: str, environment: Mapping[str, str] | None = None) -> Script:
    """Follow a script from beginning to end.

    Args:
        name: of the script, for messages.
        environment: variables from outside; this process's when None. Those that hold secrets count as unknown.

    Raises:
        UsageError: it has a construct that is not supported.
    """
    script = Script()
    _Runner(script, name, os.environ if environment is None else environment).run(tokens(text, name))
    return script


class _Runner:
    """Goes through tokens, statement by statement."""

    def __init__(self, script: Script, name: str, environment: Mapping[str, str], depth: int = 0) -> None:
        self._script, self._name, self._environment, self._depth = script, name, environment, depth

    def run(self, found: Sequence[Token]) -> None:
        if self._depth > _TOO_DEEP:
            line = found[0].line if found else 0
            raise UsageError(f"{self._name} line {line}: nested too deeply", "write the command out in full")
        at = 0
        while at < len(found):
            token = found[at]
            word = token.plain
            if token.operator or word in ("{", "}", "then", "do", "!"):
                at += 1
            elif word in _NOT_UNDERSTOOD or (
                at + 2 < len(found) and [t.operator for t in found[at + 1 : at + 3]] == ["(", ")"]
            ):
                raise UsageError(
                    f"{self._name} line {token.line}: `{word}` is not supported",
                    "move the training command with its flags to a separate script",
                )
            elif word == "for":
                at = self._for(found, at)
            elif word == "if":
                at = self._if(found, at)
            else:
                end = at
                while end < len(found) and (not found[end].operator or found[end].operator == ">"):
                    end += 1
                self._simple(found[at:end])
                at = end

    def _deeper(self) -> _Runner:
        return _Runner(self._script, self._name, self._environment, self._depth + 1)

    def _end(self, found: Sequence[Token], start: int, opening: str, closing: str) -> int:
        depth = 0
        for at in range(start, len(found)):
            begins = at == 0 or bool(found[at - 1].operator) or found[at - 1].plain in ("then", "do", "else")
            if begins:
                depth += (found[at].plain == opening) - (found[at].plain == closing)
            if depth == 0:
                return at
        raise UsageError(f"{self._name} line {found[start].line}: `{opening}` has no `{closing}`", "close it")

    def _for(self, found: Sequence[Token], at: int) -> int:
        end = self._end(found, at, "for", "done")
        body = next((n for n in range(at, end) if found[n].plain == "do"), end)
        variable, values = found[at + 1].plain, [t for t in found[at + 3 : body] if not t.operator]
        fields = [value for token in values for value in self.fields(token)]
        if len(fields) > 1:
            self._script.remarks.append(
                f"line {found[at].line}: only the first of {variable}'s values {', '.join(fields)} is used; "
                "to use another, move it to the front and import again"
            )
        if fields:
            self._script.variables[variable] = fields[0]
            self._deeper().run(found[body + 1 : end])
        return end + 1

    def _if(self, found: Sequence[Token], at: int) -> int:
        end = self._end(found, at, "if", "fi")
        branches: list[tuple[Sequence[Token] | None, Sequence[Token]]] = []
        inner, marks = 0, [at]
        for n in range(at + 1, end):
            if found[n - 1].operator or found[n - 1].plain in ("then", "else", "do"):
                inner += (found[n].plain == "if") - (found[n].plain == "fi")
                if not inner and found[n].plain in ("elif", "else"):
                    marks.append(n)
        for begin, stop in zip(marks, [*marks[1:], end], strict=True):
            if found[begin].plain == "else":
                branches.append((None, found[begin + 1 : stop]))
                continue
            then = next((n for n in range(begin, stop) if found[n].plain == "then"), stop)
            branches.append((found[begin + 1 : then], found[then + 1 : stop]))
        for condition, body in branches:
            if condition is None or self._holds(condition):
                self._deeper().run(body)
                break
        return end + 1

    def _holds(self, condition: Sequence[Token]) -> bool:
        words = [value for token in condition if not token.operator for value in self.fields(token) or [""]]
        inside = words[1:-1] if words and words[0] in ("[", "[[") else []
        known = not any(text in word for word in inside for text in self._script.unknown)
        if known and len(inside) == 3 and inside[1] in ("=", "==", "!=", "-eq", "-ne"):
            return (inside[0] == inside[2]) == (inside[1] in ("=", "==", "-eq"))
        if known and len(inside) == 2 and inside[0] in ("-z", "-n"):
            return bool(inside[1]) == (inside[0] == "-n")
        told = " ".join(words)
        self._script.remarks.append(f"line {condition[0].line}: `{told}` is not evaluated and is assumed to be true")
        return True

    def _simple(self, found: Sequence[Token]) -> None:
        words: list[Token] = []
        skip = False
        for token in found:
            if not skip and not token.operator:
                words.append(token)
            skip = token.operator == ">"
        while words and self._assigned(words[0]):
            words = words[1:]
        if words and words[0].plain in _BUILTINS:
            for token in words[1:]:
                self._assigned(token)
            return
        line = words[0].line if words else 0
        fields = [value for token in words for value in self.fields(token)]
        if not fields:
            return
        if fields[0] == "eval":
            self._deeper().run(tokens(" ".join(fields[1:]), self._name))
        elif fields[0] in ("source", "."):
            self._script.remarks.append(f"line {line}: `{' '.join(fields)}` is ignored")
        else:
            self._script.commands.append(Command(tuple(fields), line))

    def _assigned(self, token: Token) -> bool:
        """Perform an assignment; return whether the word is one."""
        first = token.parts[0] if token.parts else None
        match = _ASSIGNMENT.fullmatch(first.text) if first is not None and first == Part("text", first.text) else None
        if match is None:
            return False
        name, variables = match[1], self._script.variables
        if token.array is not None:
            elements = [value for element in token.array for value in self.fields(element)]
            before = variables.get(name, []) if match[2] == "+=" else []
            variables[name] = [*([before] if isinstance(before, str) else before), *elements]
            return True
        rest = Token(token.line, (Part("text", match[3], quoted=True), *token.parts[1:]))
        quoted = tuple(Part(p.kind, p.text, True, p.every, p.otherwise) for p in rest.parts)
        value = " ".join(self.fields(Token(token.line, quoted)))
        old = variables.get(name, "") if match[2] == "+=" else ""
        self._spend(sum(map(len, old)), token.line)
        variables[name] = (old if isinstance(old, str) else " ".join(old)) + value
        return True

    def fields(self, token: Token) -> list[str]:
        """Return what a word expands to."""
        found: list[str] = []
        open_field = False

        def add(text: str) -> None:
            nonlocal open_field
            self._spend(len(text) + 1, token.line)
            if open_field:
                found[-1] += text
            else:
                found.append(text)
            open_field = True

        for part in token.parts:
            if part.kind != "variable":
                if part.kind == "unknown":
                    self._script.unknown.add(part.text)
                if part.text or part.quoted:
                    add(part.text)
                continue
            value = self._value(part)
            if part.every and part.quoted:
                for number, element in enumerate([value] if isinstance(value, str) else value):
                    open_field = open_field and number == 0
                    add(element)
            elif part.quoted:
                add(value if isinstance(value, str) else (value[0] if value else ""))
            else:
                every = [value] if isinstance(value, str) else value if part.every else value[:1]
                text = " ".join(every)
                if text[:1].isspace():
                    open_field = False
                for number, piece in enumerate(text.split()):
                    open_field = open_field and number == 0
                    add(piece)
                if text[-1:].isspace():
                    open_field = False
        return found

    def _spend(self, characters: int, line: int) -> None:
        self._script.expanded += characters
        if self._script.expanded > _MOST_TEXT:
            raise UsageError(
                f"{self._name} line {line}: its variables expand to more than {_MOST_TEXT:,} characters",
                "write the command out in full",
            )

    def _value(self, part: Part) -> str | list[str]:
        value = self._script.variables.get(part.text)
        if value is None:
            outside = self._environment.get(part.text)
            value = None if outside is None or is_secret(part.text, outside) else outside
        if value is None or (value == "" and part.otherwise is not None):
            if part.otherwise is not None:
                return part.otherwise
            text = f"${part.text}"
            self._script.unknown.add(text)
            return text
        return value
