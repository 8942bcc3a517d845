"""What lies under the name of a file of data in its place: a download's left-overs, or a list of other files."""

from __future__ import annotations

from dataclasses import dataclass

HEAD = 512
"""Bytes of a file's beginning that show what it is."""


@dataclass(frozen=True)
class StandIn:
    """What a file is instead, as in "it is ...", and what to do about it."""

    what: str
    advice: str


_LFS = StandIn("a Git LFS pointer", "run `git lfs pull` where it comes from")
_PAGE = StandIn("a web page", "download the file itself, for example with `hf download`")
_LIST = StandIn("a list of other files", "give the files that it names, or join them: ffmpeg -i IN -c copy OUT.mp4")

_BEGINNINGS = {
    b"version https://git-lfs": _LFS,
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"#extm3u": _LIST,
    b"ffconcat version": _LIST,
}


def stand_in(start: bytes) -> StandIn | None:
    """What a file that begins with ``start`` is, if it stands in the place of data."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<?xml") and b"<mpd" in text:
        return _LIST
    return next((what for beginning, what in _BEGINNINGS.items() if text.startswith(beginning)), None)
