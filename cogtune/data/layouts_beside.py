"""The layout without any list: a folder of clips, each with its caption in a text file beside it."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from cogtune.config import DataFormat
from cogtune.data.findings import Finding, finding
from cogtune.data.layouts import Content, Layout, Reading, Sample, files_under, ids, is_clip
from cogtune.files import explained


def _read(root: Path, reading: Reading) -> Content:
    inside = root.resolve()
    findings: list[Finding] = []
    unread: list[OSError] = []
    files = files_under(root, follow=reading.allow_outside, refused=unread.append)
    for error in unread:
        folder = os.path.relpath(error.filename, root)
        message = f"the folder {folder} cannot be read: {error.strerror}"
        findings.append(finding("bad-path", folder, message, "check its permissions, or move it out of the dataset"))
    clips = []
    for file in filter(is_clip, files):
        shown = str(file).encode(errors="backslashreplace").decode()
        if shown != str(file):
            message = f"the file name {shown} is not UTF-8"
            findings.append(finding("bad-path", shown, message, "rename the file"))
        elif reading.allow_outside or (root / file).resolve().is_relative_to(inside):
            clips.append(file)
        else:
            message = f"{file} is a link that leaves the dataset's folder"
            hint = "copy the file itself to this place, or give --allow-outside"
            findings.append(finding("outside-folder", shown, message, hint))
    samples = []
    for identity, clip in zip(ids(clips), clips, strict=True):
        text = _read_caption(root, identity, clip, reading, findings)
        samples.append(Sample(identity, root / clip, text))
    captioned = {clip.with_suffix(".txt") for clip in files if is_clip(clip)}
    for file in files:
        if file.suffix == ".txt" and file not in captioned:
            message = f"{file} has no clip beside it"
            findings.append(finding("stray-caption", str(file), message, "add its clip, or remove the file"))
    return Content(BESIDE.name, samples, findings)


def _read_caption(root: Path, identity: str, clip: PurePosixPath, reading: Reading, findings: list[Finding]) -> str:
    """The whole text of a sample's caption file; empty, with a finding, when it cannot be had."""
    file = clip.with_suffix(".txt")
    if not reading.allow_outside and not (root / file).resolve().is_relative_to(root.resolve()):
        message = f"its caption {file} is a link that leaves the dataset's folder"
        hint = "copy the file itself to this place, or give --allow-outside"
        problem = finding("outside-folder", identity, message, hint)
    elif not (root / file).is_file():  # a pipe would be waited for without end
        state = "is no plain file" if (root / file).exists() else "is not there"
        message = f"{clip} has no caption: {file} {state}"
        problem = finding("missing-caption", identity, message, f"describe the clip in {file}")
    else:
        with explained(root / file, "read"):
            data = (root / file).read_bytes()
        try:
            return data.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            byte = error.start - data.rfind(b"\n", 0, error.start)
            message = f"byte {byte} of line {line} of {file}, 0x{data[error.start]:02x}, is not UTF-8"
            problem = finding("not-utf8", identity, message, f"save {file} again as UTF-8")
    findings.append(problem)
    return ""


def _detect(root: Path, reading: Reading) -> DataFormat | None:
    files = files_under(root, follow=reading.allow_outside)
    return "beside" if any(is_clip(file) and file.with_suffix(".txt") in files for file in files) else None


BESIDE = Layout(
    ("beside",),
    "captions beside clips",
    "a folder of clips, each with a text file of the same name beside it (a.mp4, a.txt)",
    _detect,
    _read,
)
