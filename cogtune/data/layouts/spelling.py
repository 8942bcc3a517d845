"""Ways in which the same name is written: systems differ in Unicode form, case, quotes and what parts folders."""

from __future__ import annotations

import unicodedata

_QUOTES = {'"': '"', "'": "'", "“": "”", "`": "`"}


def nfc(text: str) -> str:
    """Return ``text`` in the composed Unicode form, which most systems write; a Mac's names are decomposed."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def normal(text: str) -> str:
    """Return ``text`` in one spelling, whatever its Unicode form, and its upper and lower case."""
    return nfc(nfc(text).casefold())


def unquoted(text: str) -> str:
    """Return ``text`` without the quotes around it, if it stands between two that belong together."""
    return text[1:-1].strip() if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] else text
