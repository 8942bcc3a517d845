"""The words and operators of a shell script.

Source: the POSIX shell's grammar, and bash's manual for arrays.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal

from cogtune.system.errors import UsageError

_NAME = re.compile(r"[A-Za-z_]\w*")
_REDIRECT = re.compile(r"\d*(?:<<<|<<-?|>>|>\||&>>?|>&|<&|>|<)")
_OPERATOR = re.compile(r"&&|\|\||;;|[;&|()\n]")
_PARAMETER = re.compile(r"([A-Za-z_]\w*)(\[[@*]\])?(?::?[-=](.*))?", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A piece of a word: text, a variable's value, or something that is not evaluated."""

    kind: Literal["text", "variable", "unknown"]
    text: str
    quoted: bool = False
    every: bool = False
    """Whether it expands to all elements of an array."""
    otherwise: str | None = None
    """The value if the variable is not set."""


@dataclass(frozen=True)
class Token:
    """A word, with its parts, or an operator."""

    line: int
    parts: tuple[Part, ...] = ()
    operator: str = ""
    array: tuple[Token, ...] | None = None
    """The elements, if the word assigns an array."""

    @property
    def plain(self) -> str:
        """The word if all of it is unquoted text, else empty."""
        return self.parts[0].text if len(self.parts) == 1 and self.parts[0] == Part("text", self.parts[0].text) else ""


def tokens(text: str, name: str) -> list[Token]:
    """Return the words and operators of a script."""
    return _Lexer(text.replace("\r\n", "\n"), name).all()


class _Lexer:
    def __init__(self, text: str, name: str) -> None:
        self._text, self._name, self._at, self._heredocs = text, name, 0, list[str]()
        self._counted = (0, 1)
        self._in_array = False

    def all(self) -> list[Token]:
        found: list[Token] = []
        while (token := self._next()) is not None:
            found.append(token)
            if token.operator == "\n" and self._heredocs:
                self._skip_heredocs()
        return found

    @property
    def _line(self) -> int:
        """The line, counted on from the last one that was asked for."""
        before, line = self._counted
        self._counted = (self._at, line + self._text.count("\n", before, self._at))
        return self._counted[1]

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
        for (kind, quoted), group in itertools.groupby(parts, key=lambda part: (part.kind, part.quoted)):
            alike = list(group)
            merged += [Part("text", "".join(part.text for part in alike), quoted)] if kind == "text" else alike
        return Token(line, tuple(merged))

    def _piece(self, char: str) -> list[Part]:
        if char == "'":
            end = self._text.find("'", self._at + 1)
            if end < 0:
                raise self.fail("unclosed quote (')")
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
        raise self.fail('unclosed quote (")')

    def _dollar(self, *, quoted: bool) -> Part:
        """Return a variable, or another expansion that begins with ``$`` or a backquote."""
        start = self._at
        if self._text[start] == "`":
            end = self._text.find("`", start + 1)
            if end < 0:
                raise self.fail("unclosed backquote")
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
        raise self.fail(f"unclosed {opening}")

    def _array(self) -> tuple[Token, ...]:
        if self._in_array:
            raise self.fail("an array inside an array")
        self._at, self._in_array = self._at + 1, True
        found: list[Token] = []
        while True:
            token = self._next()
            if token is None:
                raise self.fail("unclosed array")
            if token.operator == ")":
                self._in_array = False
                return tuple(found)
            if not token.operator:
                found.append(token)
