"""Reading the program's HTML pages in tests: well-formed or not, and what they hold."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

VOID = {"img", "input", "meta"}


@dataclass
class Element:
    """A tag with its attributes, and the text and the tags inside."""

    name: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, name: str, class_: str | None = None) -> list[Element]:
        """The elements of this name (and class) inside, in document order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.name == name and (class_ is None or class_ in (child.attributes.get("class") or "").split()):
                    found.append(child)
                found += child.all(name, class_)
        return found


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>: {names}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> where <{self.open[-1].name}> is open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(path: Path) -> Element:
    """The page in ``path``; every tag in it is closed, in order, and nothing is fetched from elsewhere."""
    tree = _Tree()
    tree.feed(path.read_text(encoding="utf-8"))
    tree.close()
    assert tree.open == [tree.root], f"never closed: {[element.name for element in tree.open[1:]]}"
    (page,) = tree.root.all("html")
    assert [element.name for element in page.children if isinstance(element, Element)] == ["head", "body"]
    assert page.all("link") == []
    assert all("src" not in script.attributes for script in page.all("script"))
    assert len(page.all("script")) == 1
    for image in page.all("img"):
        assert (image.attributes["src"] or "").startswith("data:image/jpeg;base64,")
        assert image.attributes["alt"]
    ids = [
        element.attributes["id"]
        for name in ("section", "article")
        for element in page.all(name)
        if "id" in element.attributes
    ]
    assert len(ids) == len(set(ids))
    return page


def pixels(source: str) -> np.ndarray:
    """The picture in a data address, ``uint8 [H, W, 3]``."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB"))
