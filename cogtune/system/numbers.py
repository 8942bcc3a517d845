"""Numbers in text that anyone may have written."""

from __future__ import annotations

import re


def whole_number(text: str) -> int | None:
    """Return the number that up to nine digits spell; None for any other text, such as a superscript two."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None
