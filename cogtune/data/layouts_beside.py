"""The layout without any list: a folder of clips, each with its caption in a text file beside it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from cogtune.config import DataFormat
from cogtune.data.findings import Finding, finding
from cogtune.data.layouts import Content, Layout, Reading, Sample, files_under, ids, is_clip
from cogtune.files import explained


def _read(root: Path, reading: Reading) -> Content:
    inside = root.resolve()
    findings: list[Finding] = []
    files = files_under(root, follow=reading.allow_outside)
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
        caption = clip.with_suffix(".txt")
        text = ""
        if caption in files:
            text = _read_caption(root, caption, findings)
        else:
            message = f"{clip} has no caption: {caption} is not there"
            findings.append(finding("missing-caption", identity, message, f"describe the clip in {caption}"))
        samples.append(Sample(identity, root / clip, text))
    captioned = {clip.with_suffix(".txt") for clip in clips}
    for file in files:
        if file.suffix == ".txt" and file not in captioned:
            message = f"{file} has no clip beside it"
            findings.append(finding("stray-caption", str(file), message, "add its clip, or remove the file"))
    return Content(BESIDE.name, samples, findings)


def _read_caption(root: Path, file: PurePosixPath, findings: list[Finding]) -> str:
    """The whole text of a caption file; empty, with a finding, when it is not UTF-8."""
    with explained(root / file, "read"):
        data = (root / file).read_bytes()
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = error.start - data.rfind(b"\n", 0, error.start)
        message = f"byte {byte} of line {line}, 0x{data[error.start]:02x}, is not UTF-8"
        findings.append(finding("not-utf8", f"{file}:{line}", message, f"save {file} again as UTF-8"))
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
