"""Recognising files that contain no data of their own: Git LFS pointers, web pages, playlists."""

from __future__ import annotations

from dataclasses import dataclass

HEAD = 512
"""Number of bytes at the start of a file that are enough to recognise it."""


@dataclass(frozen=True)
class NotData:
    """What a file is instead of data, as in "it is ...", and what to do about it."""

    what: str
    advice: str


_LFS = NotData("a Git LFS pointer", "run `git lfs pull` in the repository that it comes from")
_PAGE = NotData("a web page", "download the file itself, for example with `hf download`")
_LIST = NotData("a list of other files", "pass the files that it names, or join them: ffmpeg -i IN -c copy OUT.mp4")

_BEGINNINGS = {
    b"version https://git-lfs": _LFS,
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"#extm3u": _LIST,
    b"ffconcat version": _LIST,
}


def sniff(start: bytes) -> NotData | None:
    """Return what a file that begins with ``start`` is, if it contains no data of its own."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<?xml") and b"<mpd" in text:
        return _LIST
    return next((what for beginning, what in _BEGINNINGS.items() if text.startswith(beginning)), None)
