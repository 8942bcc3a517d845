"""Five hundred damaged clips through a full check: no crash, no hang, and a finding or a pass for each."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import av
import numpy as np

from cogtune.data.findings import FINDINGS
from cogtune.data.frames import FrameSettings
from cogtune.data.sources import read_dataset
from cogtune.data.validation.checks import check_dataset
from cogtune.data.video.clips import read_frames
from cogtune.models.geometry import Size

DAMAGED = 500
FRAMES = 25


def sources(folder: Path) -> list[bytes]:
    """Small clips as several programs write them: index in front and at the end, two codecs, key frames between."""
    made: list[bytes] = []
    for codec, options in (
        ("libx264", {"movflags": "+faststart"}),
        ("libx264", {}),
        ("mpeg4", {}),
        ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    ):
        path = folder / f"source-{len(made)}.mp4"
        noise = np.random.default_rng(len(made)).integers(0, 256, (8, 12, 3), np.uint8)
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream(codec, rate=8, options={"g": "10"})
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            for number in range(FRAMES):
                picture = np.kron(np.roll(noise, number, axis=1), np.ones((8, 8, 1), np.uint8))[:48, :64]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            container.mux(stream.encode(None))
        made.append(path.read_bytes())
        path.unlink()
    return made


def damaged(whole: list[bytes], chance: random.Random) -> bytes:
    """One of the clips with bytes flipped, cut out, cut off, or put in from another; its index and boxes most often."""
    data = bytearray(chance.choice(whole))
    for _ in range(chance.randint(1, 4)):
        box = data.find(chance.choice((b"moov", b"moof", b"stbl", b"avcC", b"mdat")))
        begin = chance.randrange(len(data)) if box < 0 else min(len(data) - 1, box + chance.randrange(600))
        length = chance.choice((1, 1, 2, 4, 16, 100))
        kind = chance.choice(("flip", "flip", "set", "cut", "splice", "end"))
        if kind == "flip":
            for place in range(begin, min(len(data), begin + length)):
                data[place] ^= 1 << chance.randrange(8)
        elif kind == "set":
            data[begin : begin + 4] = chance.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
        elif kind == "cut":
            del data[begin : begin + length]
        elif kind == "splice":
            other = chance.choice(whole)
            place = chance.randrange(len(other))
            data[begin:begin] = other[place : place + length]
        elif chance.random() < 0.3:
            del data[begin:]
        if not data:
            break
    return bytes(data)


def test_damaged_clips_are_findings_or_pass(tmp_path: Path) -> None:
    whole = sources(tmp_path)
    root = tmp_path / "data"
    root.mkdir()
    for number in range(DAMAGED):
        (root / f"{number}.mp4").write_bytes(damaged(whole, random.Random(number)))
        (root / f"{number}.txt").write_text(f"A picture that drifts, number {number}.")
    dataset = read_dataset(root)
    report = check_dataset(dataset, FrameSettings(size=Size(9, 48, 64), fps=8), full=True)
    assert report.counts["samples"] == DAMAGED
    codes = Counter(found.code for found in report.findings)
    assert codes.keys() <= FINDINGS.keys()
    failed = {found.where for found in report.findings if found.severity == "error"}
    for found in report.findings:
        f"{found.where} {found.message} {found.hint}".encode()
        assert "makes the decoder fail" not in found.message, found
    assert 250 < len(failed) < 450, codes
    for sample in dataset.samples:
        if sample.id not in failed:  # a pass is a promise that training can read it
            count = report.infos[sample.id].num_frames
            assert len(read_frames(sample.video, range(count))) == count
