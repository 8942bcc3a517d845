"""Normalization of names, whose Unicode form, case, quotes and separators differ between systems."""

from __future__ import annotations

import unicodedata

_QUOTES = {'"': '"', "'": "'", "“": "”", "`": "`"}


def nfc(text: str) -> str:
    """Return ``text`` in composed Unicode form, which most systems use; macOS decomposes names."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def normal(text: str) -> str:
    """Return ``text`` normalized in Unicode form and case."""
    return nfc(nfc(text).casefold())


def unquoted(text: str) -> str:
    """Return ``text`` without a pair of matching quotes around it."""
    return text[1:-1].strip() if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] else text
