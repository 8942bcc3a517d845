"""Recognising files by their first bytes: those without data of their own, and images that are not supported."""

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


# ---------------------------------------------------------------------------------------------------- images

_IMAGES = {
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL \r\n\x87\n": "a JPEG XL image",
    b"\x76\x2f\x31\x01": "an OpenEXR image",
    b"#?RADIANCE": "a Radiance HDR image",
    b"#?RGBE": "a Radiance HDR image",
    b"gimp xcf ": "a GIMP file",
    b"FUJIFILMCCD-RAW": "a camera's raw image",
    b"IIRO": "a camera's raw image",
    b"IIRS": "a camera's raw image",
    b"IIU\0": "a camera's raw image",
    b"II\xbc\x01": "a JPEG XR image",
    b"BPG\xfb": "a BPG image",
    b"%PDF-": "a PDF",
}

_IMAGE_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"), "a HEIC image"),
    b"avif": "an AVIF image",
    b"avis": "an AVIF image",
    b"crx ": "a camera's raw image",
}
"""Brands in the ``ftyp`` box of images; see ISO/IEC 14496-12, 4.3."""


def image_kind(start: bytes) -> str:
    """Return what an image that begins with ``start`` is, if Pillow does not read it everywhere; else empty."""
    if start[4:8] == b"ftyp" and start[8:12] in _IMAGE_BRANDS:
        if start[8:12] == b"mif1" and b"avif" in start[16 : int.from_bytes(start[:4], "big")]:
            return _IMAGE_BRANDS[b"avif"]
        return _IMAGE_BRANDS[start[8:12]]
    if b"<svg" in start.lower() and start.lstrip()[:1] == b"<":
        return "an SVG drawing"
    return next((what for beginning, what in _IMAGES.items() if start.startswith(beginning)), "")
