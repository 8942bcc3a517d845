"""The commands that a shell script runs, with its variables filled in. Nothing is executed.

As much of the language is understood as training scripts use: variables, arrays, quotes, ``for`` over a list (its first
value counts), ``if`` with comparisons, ``eval``. Source: the POSIX shell's grammar, and bash's manual for arrays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cogtune.system.errors import UsageError

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?=)(.*)", re.DOTALL)
_REDIRECT = re.compile(r"\d*(?:<<<|<<-?|>>|>\||&>>?|>&|<&|>|<)")
_OPERATOR = re.compile(r"&&|\|\||;;|[;&|()\n]")
_PARAMETER = re.compile(r"([A-Za-z_]\w*)(\[[@*]\])?(?::?[-=](.*))?", re.DOTALL)
_BUILTINS = ("export", "declare", "local", "readonly", "typeset")
_NOT_UNDERSTOOD = ("while", "until", "case", "select", "function")
_TOO_DEEP = 20


@dataclass(frozen=True)
class Part:
    """A piece of a word: text, a variable's value, or what is not evaluated here."""

    kind: Literal["text", "variable", "unknown"]
    text: str
    quoted: bool = False
    every: bool = False
    """Whether all elements of an array are meant."""
    otherwise: str | None = None
    """The value of a variable that is not set."""


@dataclass(frozen=True)
class Token:
    """A word, with its parts, or an operator."""

    line: int
    parts: tuple[Part, ...] = ()
    operator: str = ""
    array: tuple[Token, ...] | None = None
    """The elements, where the word is an assignment of an array."""

    @property
    def plain(self) -> str:
        """The word where all of it is unquoted text, else nothing."""
        return self.parts[0].text if len(self.parts) == 1 and self.parts[0] == Part("text", self.parts[0].text) else ""


@dataclass(frozen=True)
class Command:
    """Words as the program that is called gets them."""

    words: tuple[str, ...]
    line: int


@dataclass
class Script:
    """What a script does, as far as it was followed."""

    commands: list[Command] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    """Texts left in words in place of values that are not known."""
    variables: dict[str, str | list[str]] = field(default_factory=dict)


def follow(text: str, name: str, environment: Mapping[str, str] | None = None) -> Script:
    """Follow a script from beginning to end.

    Args:
        name: of the script, for messages.
        environment: variables from outside; this process's when None.

    Raises:
        UsageError: it has a construct that is not understood.
    """
    script = Script()
    _Runner(script, name, os.environ if environment is None else environment).run(tokens(text, name))
    return script


def tokens(text: str, name: str) -> list[Token]:
    """The words and operators of a script."""
    return _Lexer(text.replace("\r\n", "\n"), name).all()


class _Lexer:
    def __init__(self, text: str, name: str) -> None:
        self._text, self._name, self._at, self._heredocs = text, name, 0, list[str]()

    def all(self) -> list[Token]:
        found: list[Token] = []
        while (token := self._next()) is not None:
            found.append(token)
            if token.operator == "\n" and self._heredocs:
                self._skip_heredocs()
        return found

    @property
    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1

    def fail(self, what: str) -> UsageError:
        return UsageError(f"{self._name} line {self._line}: {what}", "close it, or write the command out in full")

    def _skip_blanks(self) -> None:
        while self._at < len(self._text):
            if self._text[self._at] in " \t":
                self._at += 1
            elif self._text.startswith("\\\n", self._at):
                self._at += 2
            elif self._text[self._at] == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            else:
                return

    def _next(self) -> Token | None:
        self._skip_blanks()
        if self._at >= len(self._text):
            return None
        line = self._line
        if match := _REDIRECT.match(self._text, self._at):
            self._at = match.end()
            if match[0].lstrip("0123456789") in ("<<", "<<-"):
                self._skip_blanks()
                self._heredocs.append("".join(part.text for part in self._word().parts))
                return Token(line, operator=";")
            return Token(line, operator=">")
        if match := _OPERATOR.match(self._text, self._at):
            self._at = match.end()
            return Token(line, operator=match[0])
        return self._word()

    def _skip_heredocs(self) -> None:
        for delimiter in self._heredocs:
            match = re.compile(rf"^\t*{re.escape(delimiter)}$", re.MULTILINE).search(self._text, self._at)
            self._at = match.end() if match else len(self._text)
        self._heredocs.clear()

    def _word(self) -> Token:
        line, parts = self._line, list[Part]()
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in " \t\n;&|<>)":
                break
            if char == "(":
                text = "".join(part.text for part in parts if part == Part("text", part.text))
                if re.fullmatch(r"[A-Za-z_]\w*\+?=", text):
                    return Token(line, (Part("text", text),), array=self._array())
                break
            parts += self._piece(char)
        merged: list[Part] = []
        for part in parts:
            if merged and part.kind == merged[-1].kind == "text" and part.quoted == merged[-1].quoted:
                merged[-1] = Part("text", merged[-1].text + part.text, part.quoted)
            else:
                merged.append(part)
        return Token(line, tuple(merged))

    def _piece(self, char: str) -> list[Part]:
        if char == "'":
            end = self._text.find("'", self._at + 1)
            if end < 0:
                raise self.fail("a quote (') is never closed")
            piece, self._at = self._text[self._at + 1 : end], end + 1
            return [Part("text", piece, quoted=True)]
        if char == '"':
            return self._double_quoted()
        if char == "\\":
            self._at += 2
            escaped = self._text[self._at - 1 : self._at]
            return [] if escaped == "\n" else [Part("text", escaped, quoted=True)]
        if char in "$`":
            return [self._dollar(quoted=False)]
        self._at += 1
        return [Part("text", char)]

    def _double_quoted(self) -> list[Part]:
        parts, self._at = [Part("text", "", quoted=True)], self._at + 1
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == '"':
                self._at += 1
                return parts
            if char == "\\" and self._text[self._at + 1 : self._at + 2] in ('"', "\\", "$", "`", "\n"):
                escaped = self._text[self._at + 1]
                parts.append(Part("text", "" if escaped == "\n" else escaped, quoted=True))
                self._at += 2
            elif char in "$`":
                parts.append(self._dollar(quoted=True))
            else:
                parts.append(Part("text", char, quoted=True))
                self._at += 1
        raise self.fail('a quote (") is never closed')

    def _dollar(self, *, quoted: bool) -> Part:
        """A variable, or what else begins with ``$`` or a backquote."""
        start = self._at
        if self._text[start] == "`":
            end = self._text.find("`", start + 1)
            if end < 0:
                raise self.fail("a backquote is never closed")
            self._at = end + 1
        elif self._text[start + 1 : start + 2] in ("(", "{"):
            self._at = self._closing(start + 1)
            inside = self._text[start + 2 : self._at - 1]
            match = _PARAMETER.fullmatch(inside) if self._text[start + 1] == "{" else None
            if match is not None:
                return Part("variable", match[1], quoted, bool(match[2]), match[3])
        elif match := _NAME.match(self._text, start + 1):
            self._at = match.end()
            return Part("variable", match[0], quoted)
        else:
            self._at = start + 2 if self._text[start + 1 : start + 2] in tuple("?#@*!$0123456789-") else start + 1
        text = self._text[start : self._at]
        return Part("text" if text == "$" else "unknown", text, quoted)

    def _closing(self, start: int) -> int:
        opening, depth = self._text[start], 0
        closing = {"(": ")", "{": "}"}[opening]
        for at in range(start, len(self._text)):
            depth += (self._text[at] == opening) - (self._text[at] == closing)
            if depth == 0:
                return at + 1
        raise self.fail(f"{opening} is never closed")

    def _array(self) -> tuple[Token, ...]:
        self._at += 1
        found: list[Token] = []
        while True:
            token = self._next()
            if token is None:
                raise self.fail("an array's ( is never closed")
            if token.operator == ")":
                return tuple(found)
            if not token.operator:
                found.append(token)


class _Runner:
    """Goes through tokens, statement by statement."""

    def __init__(self, script: Script, name: str, environment: Mapping[str, str], depth: int = 0) -> None:
        self._script, self._name, self._environment, self._depth = script, name, environment, depth

    def run(self, found: Sequence[Token]) -> None:
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
                    f"{self._name} line {token.line}: `{word}` is not understood here",
                    "put the training command with its flags into a script of its own",
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
                f"line {found[at].line}: of {variable}'s values {', '.join(fields)} the first is taken: import again "
                "with another first, for a run of each"
            )
        if fields:
            self._script.variables[variable] = fields[0]
            self.run(found[body + 1 : end])
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
                self.run(body)
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
        self._script.remarks.append(f"line {condition[0].line}: `{told}` is not evaluated; it is taken to hold")
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
            if self._depth > _TOO_DEEP:
                raise UsageError(f"{self._name} line {line}: `eval` without end", "write the command out")
            inner = _Runner(self._script, self._name, self._environment, self._depth + 1)
            inner.run(tokens(" ".join(fields[1:]), self._name))
        elif fields[0] in ("source", "."):
            self._script.remarks.append(f"line {line}: `{' '.join(fields)}` is not read")
        else:
            self._script.commands.append(Command(tuple(fields), line))

    def _assigned(self, token: Token) -> bool:
        """Whether a word is an assignment, which then is made."""
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
        variables[name] = (old if isinstance(old, str) else " ".join(old)) + value
        return True

    def fields(self, token: Token) -> list[str]:
        """What a word expands to."""
        found: list[str] = []
        open_field = False

        def add(text: str) -> None:
            nonlocal open_field
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

    def _value(self, part: Part) -> str | list[str]:
        value = self._script.variables.get(part.text, self._environment.get(part.text))
        if value is None or (value == "" and part.otherwise is not None):
            if part.otherwise is not None:
                return part.otherwise
            text = f"${part.text}"
            self._script.unknown.add(text)
            return text
        return value
