"""HTML with escaping by default, and the page template of both reports.

Captions, file names and prompts are untrusted: a string is text and is escaped, unless it is :class:`Html`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Container, Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

from cogtune.system.console import printable
from cogtune.system.files import write_atomic
from cogtune.system.folders import remove_leftovers


class Html(str):
    """Markup, which is not escaped."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"
"""Contents of a tag: markup, text, a number, nothing, or several of these."""

_UNSHOWABLE = re.compile("[\ufffe\uffff]")
"""Characters that HTML forbids, other than control characters."""

_VOID = frozenset({"img", "input", "meta"})


def text(value: object) -> Html:
    """Return ``value`` as escaped text; markup is unchanged.

    Control characters and those that change the direction of writing are spelled out as in the terminal.
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(_UNSHOWABLE.sub("\ufffd", printable(str(value)))))


def join(*children: Child) -> Html:
    """Return the children joined, with text escaped and without None."""
    return Html("".join(_flat(children)))


def _flat(children: Iterable[Child]) -> Iterator[str]:
    for child in children:
        if isinstance(child, (str, int)):
            yield text(child)
        elif child is not None:
            yield from _flat(child)


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """Return ``<name attributes>children</name>``.

    Args:
        attributes: ``class_`` stands for ``class``, ``aria_label`` for ``aria-label``; None and False are
            omitted, True is an attribute without a value.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        words.append(plain if value is True else f'{plain}="{text(value)}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in _VOID else f"{opening}{join(*children)}</{name}>")


def section(title: str, *children: Child, **attributes: object) -> Html:
    """Return a section of the page with a heading."""
    return Html(f"{tag('section', tag('h2', title), *children, **attributes)}\n")


def facts(rows: Iterable[tuple[str, Child]]) -> Html:
    """Return the key figures at the head of a page, each a name and a value."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows], class_="facts")


def table(
    columns: Iterable[str],
    rows: Iterable[Iterable[Child]],
    *,
    label: str,
    wide: Container[int] = (),
    sortable: bool = False,
    compact: bool = False,
) -> Html:
    """Return a table in a scrolling box.

    Args:
        columns: the headings; without them, the first cell of each row is its heading.
        rows: the contents of cells; a row may be a complete ``<tr>``.
        label: description of the table for screen readers.
        wide: the columns, from 0, with sentences.
        sortable: whether a click on a heading sorts by it.
        compact: whether cells are as wide as what is in them, on one line.
    """

    def row(cells: Iterable[Child]) -> Html:
        if isinstance(cells, Html):
            return cells
        return tag("tr", [item(n, cell) for n, cell in enumerate(cells)])

    def item(number: int, cell: Child) -> Html:
        if not names and number == 0:
            return tag("th", cell, scope="row")
        return tag("td", cell, class_="wide" if number in wide else None)

    names = tuple(columns)
    head = tag("thead", tag("tr", [tag("th", name, scope="col") for name in names])) if names else None
    classes = " ".join(name for name, has in (("sortable", sortable), ("compact", compact)) if has) or None
    whole = tag("table", head, tag("tbody", [row(cells) for cells in rows]), class_=classes)
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def page(title: str, parts: Iterable[Html]) -> Iterator[str]:
    """Yield a page in pieces: style and script are inline, and only videos next to it are loaded."""
    style, script = _resource("style.css"), _resource("page.js")
    # Should markup ever slip in from a caption, this policy still lets no script run but ours.
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src 'self' file:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    yield f'<!doctype html>\n<html lang="en">\n{head}\n<body>\n<main>\n'
    yield from parts
    yield f"</main>\n{tag('script', Html(script))}\n</body>\n</html>\n"


def write_page(path: Path, title: str, parts: Iterable[Html]) -> None:
    """Write a page to ``path`` atomically, with one part in memory at a time.

    Raises:
        CogtuneError: the file cannot be written.
    """

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", newline="\n") as handle:
            for piece in page(title, parts):
                handle.write(piece)

    remove_leftovers(path.parent, path.name)
    write_atomic(path, write)
