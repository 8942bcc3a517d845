"""Redacting the access token, in any encoding, from what a server answers."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from urllib.parse import quote

HIDDEN = "***"

_OPAQUE = re.compile(r"[A-Za-z0-9+/=_~%-]{32,}")
"""Long runs of the characters in which secrets are spelled."""

_MIXED = (re.compile("[a-z]"), re.compile("[A-Z]"), re.compile("[0-9]"))


def redacted(text: str, token: str, keep: tuple[str, ...] = ()) -> str:
    """Remove ``token`` from ``text``: as is, reversed, URL-quoted, in hex, base32 or base64.

    Anything else that looks like a secret is removed as well, since it could be the token in another encoding.

    Args:
        keep: names that are known not to be secrets.
    """
    if token:
        for spelling in sorted(set(_spellings(token)), key=len, reverse=True):
            text = re.sub(re.escape(spelling), HIDDEN, text, flags=re.IGNORECASE)

    def hide(found: re.Match[str]) -> str:
        word = found[0]
        known = any(name in word for name in keep)
        return HIDDEN if not known and all(kind.search(word) for kind in _MIXED) else word

    return _OPAQUE.sub(hide, text)


def _spellings(token: str) -> Iterator[str]:
    for word in (token, token[::-1]):
        data = word.encode()
        yield word
        yield quote(word, safe="")
        yield "".join(f"%{byte:02X}" for byte in data)
        yield data.hex()
        for shift in range(5):  # behind other bytes, such as a name and a colon, the same ones are spelled otherwise
            padded = b"\0" * shift + data
            if shift < 3:
                # the first and the last characters also stand for the neighbours
                inner = base64.b64encode(padded).rstrip(b"=")[-(-shift * 8 // 6) : -1].decode()
                yield inner
                yield inner.translate(str.maketrans("+/", "-_"))
            yield base64.b32encode(padded).rstrip(b"=")[-(-shift * 8 // 5) : -1].decode()
