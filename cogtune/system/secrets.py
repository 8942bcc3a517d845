"""What looks like a secret, by the name it has or by its form."""

from __future__ import annotations

import re

_NAME = re.compile(
    r"(^|_)(token|secret|password|passwd|credentials?|api_?key|access_?key|private_?key)s?(_|$)",
    re.IGNORECASE,
)

SECRET_TEXT = (
    r"://[^/\s]*@"  # a URL with a password
    r"|\b(?:hf|api_org|gh[pousr])_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}"  # access tokens, by their form
)
"""Pattern of text that contains a secret."""

_TEXT = re.compile(SECRET_TEXT)


def is_secret_name(name: str) -> bool:
    """Return whether a key or a variable of this name holds a secret."""
    return bool(_NAME.search(name))


def is_secret(name: str, value: str) -> bool:
    """Return whether a variable holds a secret, by its name or by its value."""
    return is_secret_name(name) or bool(_TEXT.search(value))
