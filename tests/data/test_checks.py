"""Validation finds every kind of fault, all of them at once, worst first, without a model."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.codec.context import Flags as CodecFlags
from PIL import Image

from cogtune.data.cache.facts import Facts
from cogtune.data.findings import FINDINGS, SEVERITIES, Finding, finding, listed
from cogtune.data.frames import FrameSettings
from cogtune.data.layouts import own_files
from cogtune.data.sources import read_dataset
from cogtune.data.validation import inspection
from cogtune.data.validation.captions import count_words, normal_form, not_english
from cogtune.data.validation.checks import ValidationReport, check_dataset
from cogtune.data.video.clips import write_video
from cogtune.models.checkpoint_configs import ModelSpec, published_spec
from cogtune.models.geometry import Reshape, Size
from cogtune.models.variants import VARIANTS
from tests.support import broken_decoder, containers

SETTINGS = FrameSettings(size=Size(9, 64, 96), fps=8)

SPEC_1_0 = ModelSpec(
    num_layers=30,
    num_attention_heads=30,
    attention_head_dim=64,
    in_channels=16,
    out_channels=16,
    patch_size=2,
    patch_size_t=None,
    text_embed_dim=4096,
    max_text_seq_length=226,
    sample_height=8,
    sample_width=12,
    sample_frames=49,
    rotary=False,
    learned_positions=False,
    ofs_embed_dim=None,
    scaling_factor=1.15258426,
    invert_scale_latents=False,
    num_train_timesteps=1000,
    snr_shift_scale=3.0,
)


def clip(path: Path, count: int = 12, height: int = 64, width: int = 96, fps: float = 8, grey: int = 0) -> Path:
    write_video(path, np.full((count, height, width, 3), grey, np.uint8), fps)
    return path


_INTERLACED = int(CodecFlags.interlaced_dct | CodecFlags.interlaced_me)


def special_clip(
    path: Path,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rotation: int = 0,
    rate: int = 8,
    times: Sequence[int] = range(12),
    **traits: Any,
) -> None:
    """A black clip with whatever a codec's context may be told; ``times`` are in parts of a second, ``rate`` each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *((96, 64) if rotation else (64, 96)), pixel_format
        for name, value in traits.items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        for time in times:
            frame = av.VideoFrame(stream.width, stream.height, pixel_format)
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _bare_stream(path: Path) -> None:
    """Motion JPEG outside of any container, which knows of no time."""
    with av.open(str(path), "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for _ in range(40):
            container.mux(stream.encode(av.VideoFrame(96, 64, "yuvj420p")))
        container.mux(stream.encode(None))


def sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        assert isinstance(stream, av.AudioStream)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))


def lists(root: Path, captions: list[str], videos: list[str], images: list[str] | None = None) -> None:
    root.mkdir(exist_ok=True)
    (root / "prompts.txt").write_text("\n".join(captions) + "\n")
    (root / "videos.txt").write_text("\n".join(videos) + "\n")
    if images is not None:
        (root / "images.txt").write_text("\n".join(images) + "\n")


def check(root: Path, settings: FrameSettings = SETTINGS, spec: ModelSpec | None = None) -> ValidationReport:
    return check_dataset(read_dataset(root), settings, spec)


# ------------------------------------------------------------------- a dataset for each kind of fault there is


def _with_clip(make: Callable[[Path], object]) -> Callable[[Path], ValidationReport]:
    def build(root: Path) -> ValidationReport:
        lists(root, ["A black frame."], ["bad.mp4"])
        make(root / "bad.mp4")
        return check(root)

    return build


def _with_caption(caption: str) -> Callable[[Path], ValidationReport]:
    def build(root: Path) -> ValidationReport:
        clip(root / "bad.mp4")
        (root / "bad.txt").write_text(caption)
        return check(root)

    return build


def _with_lists(*arguments: list[str]) -> Callable[[Path], ValidationReport]:
    def build(root: Path) -> ValidationReport:
        lists(root, *arguments)
        clip(root / "bad.mp4")
        return check(root)

    return build


def _missing_list(root: Path) -> ValidationReport:
    (root / "prompts.txt").write_text("alone\n")
    return check(root)


def _not_utf8(root: Path) -> ValidationReport:
    lists(root, ["x"], ["bad.mp4"])
    (root / "prompts.txt").write_bytes(b"caf\xe9\n")
    return check(root)


def _cut(path: Path) -> None:
    clip(path)
    path.write_bytes(path.read_bytes()[:-100])


def _damaged(path: Path) -> None:
    clip(path)
    path.write_bytes(path.read_bytes().replace(b"stco", b"\xff" * 4).replace(b"stsz", b"\xff" * 4))


def _missing_caption(root: Path) -> ValidationReport:
    clip(root / "good.mp4")
    (root / "good.txt").write_text("A black frame.")
    clip(root / "bad.mp4")
    return check(root)


def _stray_caption(root: Path) -> ValidationReport:
    clip(root / "good.mp4")
    (root / "good.txt").write_text("A black frame.")
    (root / "bad.txt").write_text("A black frame.")
    return check(root)


def _twice(path: Path) -> None:
    clip(path)
    path.write_bytes(path.read_bytes() * 2)


def _cropped_by_its_container(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 80, 112, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame(112, 80, "yuv420p")))
        container.mux(stream.encode(None))
    containers.with_clean_aperture(path, struct.pack(">IIIIiIiI", 96, 1, 64, 1, 0, 1, 0, 1))


def _bad_image(root: Path) -> ValidationReport:
    lists(root, ["A black frame."], ["bad.mp4"], ["bad.png"])
    clip(root / "bad.mp4")
    (root / "bad.png").write_bytes(b"not a picture")
    return check(root)


def _odd_image(root: Path) -> ValidationReport:
    lists(root, ["A black frame."], ["bad.mp4"], ["bad.png"])
    clip(root / "bad.mp4")
    Image.new("RGB", (64, 64)).save(root / "bad.png")
    return check(root)


def _several_pictures(root: Path) -> ValidationReport:
    lists(root, ["A black frame."], ["bad.mp4"], ["bad.gif"])
    clip(root / "bad.mp4")
    pictures = [Image.new("RGB", (96, 64), (shade, 0, 0)) for shade in (0, 99, 200)]
    pictures[0].save(root / "bad.gif", save_all=True, append_images=pictures[1:])
    return check(root)


def _two_captions(first: str, second: str, grey: int = 9) -> Callable[[Path], ValidationReport]:
    def build(root: Path) -> ValidationReport:
        lists(root, [first, second], ["good.mp4", "bad.mp4"])
        clip(root / "good.mp4")
        clip(root / "bad.mp4", grey=grey)
        return check(root)

    return build


def _with_broken_decoder(name: str) -> Callable[[Path], ValidationReport]:
    def build(root: Path) -> ValidationReport:
        lists(root, ["A black frame.", "Another one."], [f"{name}.mp4", "good.mp4"])
        clip(root / f"{name}.mp4")
        clip(root / "good.mp4", grey=9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inspection, "look", broken_decoder.look)
            patch.setenv("COGTUNE_STALL_SECONDS", "1.5")
            return check(root)

    return build


def _with_table(text: str) -> Callable[[Path], ValidationReport]:
    def build(root: Path) -> ValidationReport:
        clip(root / "good.mp4")
        (root / "metadata.csv").write_text(f"file_name,text\ngood.mp4,A black frame.\n{text}")
        return check(root)

    return build


def _other_layout(root: Path) -> ValidationReport:
    lists(root, ["A black frame."], ["good.mp4"])
    return _with_table("")(root)


def _called_otherwise(root: Path) -> ValidationReport:
    lists(root, ["A black frame."], ["good.mp4"])
    (root / "prompts.txt").rename(root / "prompt.txt")
    clip(root / "good.mp4")
    return check(root)


def _unlisted(root: Path) -> ValidationReport:
    lists(root, ["A black frame."], ["good.mp4"])
    clip(root / "good.mp4")
    clip(root / "other.mp4", grey=9)
    return check(root)


def _sampled(root: Path) -> ValidationReport:
    clip(root / "good.mp4")
    (root / "good.txt").write_text("A black frame.")
    write_video(root / "video.mp4", np.zeros((9, 64, 96, 3), np.uint8), 8, own_files.MARK)
    return check(root)


def _at_size(size: str, spec: ModelSpec) -> Callable[[Path], ValidationReport]:
    def build(root: Path) -> ValidationReport:
        lists(root, ["A black frame."], ["good.mp4"])
        clip(root / "good.mp4", count=60)
        return check(root, FrameSettings(size=Size.parse(size), fps=8), spec)

    return build


def _reshaped(way: Reshape) -> Callable[[Path], ValidationReport]:
    def build(root: Path) -> ValidationReport:
        lists(root, ["A black frame."], ["bad.mp4"])
        clip(root / "bad.mp4", height=128, width=96)
        return check(root, replace(SETTINGS, reshape=way))

    return build


def _spread(root: Path) -> ValidationReport:
    lists(root, ["A black frame."], ["bad.mp4"])
    clip(root / "bad.mp4", count=60)
    return check(root, replace(SETTINGS, sampling="uniform"))


CASES: dict[str, tuple[Callable[[Path], ValidationReport], str, str]] = {
    "missing-list": (_missing_list, "videos.txt", "prompts.txt exists, but videos.txt does not"),
    "not-utf8": (_not_utf8, "prompts.txt:1", "byte 4 of line 1, 0xe9, is not UTF-8"),
    "line-counts": (
        _with_lists(["a", "b"], ["bad.mp4"]),
        "prompts.txt:2",
        "prompts.txt has 2 lines and videos.txt has 1 line: line 2 of prompts.txt has no partner, so nothing is paired",
    ),
    "blank-line": (
        _with_lists(["a", "", "b"], ["bad.mp4"] * 3),
        "prompts.txt:2",
        "line 2 is blank in prompts.txt: lines may be shifted, so nothing is paired",
    ),
    "bad-row": (_with_table("a,b,c\n"), "metadata.csv:3", "line 3 has 3 values, but there are 2 columns"),
    "missing-value": (_with_table(",b\n"), "metadata.csv:3", "line 3 has no video: its 'file_name' is empty"),
    "other-layout": (_other_layout, "ROOT", "read as lists; it could also be read as table"),
    "read-as": (_called_otherwise, "prompt.txt", "read as prompts.txt"),
    "left-out": (_unlisted, "ROOT", "1 clip in the folder not named in lists: other.mp4"),
    "own-files": (_sampled, "ROOT", "cogtune wrote video.mp4: not read as data"),
    "no-samples": (_with_lists([], []), "ROOT", "ROOT has no samples"),
    "bad-path": (
        _with_lists(["a"], ["."]),
        "videos.txt:1",
        "'.' is not a valid path: it is the dataset's folder itself",
    ),
    "outside-folder": (_with_lists(["a"], ["../a.mp4"]), "videos.txt:1", "../a.mp4 leads out of the dataset's folder"),
    "missing-video": (_with_lists(["A black frame."], ["gone.mp4"]), "gone", "gone.mp4 does not exist"),
    "missing-image": (_with_lists(["A black frame."], ["bad.mp4"], ["gone.png"]), "bad", "gone.png does not exist"),
    "missing-caption": (_missing_caption, "bad", "bad.mp4 has no caption: bad.txt does not exist"),
    "stray-caption": (_stray_caption, "bad.txt", "bad.txt has no clip next to it"),
    "empty-video": (_with_clip(lambda path: path.write_bytes(b"")), "bad", "bad.mp4 is empty"),
    "not-a-video": (_with_clip(lambda path: path.write_text("words " * 99)), "bad", "bad.mp4 is not a video"),
    "no-video-stream": (_with_clip(sound), "bad", "bad.mp4 has no video stream"),
    "cut-short": (_with_clip(_cut), "bad", "bad.mp4 is incomplete: 100 of *,??? bytes are missing"),
    "damaged-video": (_with_clip(_damaged), "bad", "bad.mp4 cannot be opened: its header is damaged"),
    "decoder-died": (_with_broken_decoder("crash"), "crash", "crash.mp4 crashes the decoder (SIGSEGV)"),
    "decoder-hung": (
        _with_broken_decoder("hang"),
        "hang",
        "hang.mp4 hangs the decoder: no output for 1.5 seconds",
    ),
    "unreadable-image": (_bad_image, "bad", "cannot read the image ROOT/bad.png: it is in no known image format"),
    "too-short": (
        _with_clip(lambda path: clip(path, count=24, fps=30)),
        "bad",
        "gives 7 frames at 8 fps, but training requires 9 (it has 24 at 30 fps)",
    ),
    "slow": (
        _with_clip(lambda path: clip(path, fps=5)),
        "bad",
        "runs at 5 fps, training at 8: its motion is learned 1.6 times as fast",
    ),
    "variable-rate": (
        _with_clip(lambda path: special_clip(path, times=[*range(6), *range(22, 28)])),
        "bad",
        "has a variable frame rate: its picture freezes for 1.94 of its 3.5 seconds, which training does not reproduce",
    ),
    "no-rate": (
        _with_clip(_bare_stream),
        "bad",
        "does not declare a frame rate; assumed to be 25",
    ),
    "interlaced": (
        _with_clip(lambda path: special_clip(path, flags=_INTERLACED)),
        "bad",
        "is interlaced, so its frames have combing artifacts",
    ),
    "deep-colour": (
        _with_clip(lambda path: special_clip(path, pixel_format="yuv420p10le")),
        "bad",
        "has 10 bits per channel (yuv420p10le); 8 are used",
    ),
    "hdr": (
        _with_clip(lambda path: special_clip(path, color_trc=16, color_primaries=9)),
        "bad",
        "has HDR or wide-gamut colours (PQ), which look pale without tone mapping",
    ),
    "alpha": (
        _with_clip(lambda path: special_clip(path, codec="png", pixel_format="rgba")),
        "bad",
        "has transparency (rgba), which is dropped; the colours beneath it are used",
    ),
    "several-pictures": (_several_pictures, "bad", "has an image that holds 3 pictures; the first is used"),
    "image-shape": (_odd_image, "bad", "has an image of 64x64 and a clip of 64x96, so they are cropped differently"),
    "joined": (
        _with_clip(_twice),
        "bad",
        "is 2 files joined end to end, of which 12 frames are read",
    ),
    "several-streams": (
        _with_clip(lambda path: containers.clip(path, streams=2)),
        "bad",
        "contains 2 video streams; the largest, or the first of equal ones, is read",
    ),
    "trimmed": (
        _with_clip(_cropped_by_its_container),
        "bad",
        "is cropped to 64x96 by its container, as players show it",
    ),
    "rotated": (
        _with_clip(lambda path: special_clip(path, rotation=90)),
        "bad",
        "is rotated by 90 degrees, as players show it",
    ),
    "pixel-aspect": (
        _with_clip(lambda path: special_clip(path, sample_aspect_ratio=Fraction(4, 3))),
        "bad",
        "has pixels 1.33 times as wide as high, so its frames are distorted",
    ),
    "upscaled": (
        _with_clip(lambda path: clip(path, height=32, width=64)),
        "bad",
        "32x64 is enlarged 2 times to cover 64x96",
    ),
    "cropped": (
        _with_clip(lambda path: clip(path, height=128, width=96)),
        "bad",
        "50% of each frame is cropped to make 128x96 fit 64x96",
    ),
    "barred": (
        _reshaped("letterbox"),
        "bad",
        "50% of each frame is black bars to make 128x96 fit 64x96",
    ),
    "stretched": (_reshaped("stretch"), "bad", "is distorted by 50% to make 128x96 fit 64x96"),
    "only-part": (
        _with_clip(lambda path: clip(path, count=60)),
        "bad",
        "is trained on seconds 0 to 1.12 of 7.5",
    ),
    "other-speed": (
        _spread,
        "bad",
        "has its 9 frames spread over 7.5 seconds: at 8 fps its motion is learned 6.7 times as fast",
    ),
    "empty-caption": (_with_caption(" \n"), "bad", "has an empty caption"),
    "one-word-caption": (_with_caption("mouse"), "bad", "has a caption of one word: 'mouse'"),
    "long-caption": (
        _with_caption("word " * 168),
        "bad",
        "has a caption of 168 words, about 227 tokens; the model reads 226",
    ),
    "listed-twice": (_with_lists(["One.", "Two."], ["bad.mp4", "./bad.mp4"]), "bad#2", "is the same clip as bad"),
    "same-caption": (
        _with_lists(["The same."] * 3, ["bad.mp4"] * 3),
        "bad",
        "has the same caption as bad#2 and bad#3",
    ),
    "not-text": (
        _with_caption("A mouse\0 whistles, \ufffdsteering."),
        "bad",
        r"has a caption with characters that are not text (U+0000 and U+FFFD): 'A mouse\x00 whistles, \ufffdsteering.'",
    ),
    "not-english": (
        _with_caption("Ein Dampfer fährt auf dem Fluss und pfeift."),
        "bad",
        "has a caption that does not seem to be in English (4 of 8 words are of other languages): 'Ein Dampfer *",
    ),
    "copied-video": (_two_captions("One.", "Two.", grey=0), "bad", "has the same content as good"),
    "similar-caption": (
        _two_captions("A mouse, whistling.", "a mouse whistling"),
        "good",
        "has the same caption as bad, except for capitalization, punctuation or spaces",
    ),
    "model-size": (_at_size("9x60x96", SPEC_1_0), "9x60x96", "height 60 must be a multiple of 16, such as 64"),
    "model-advice": (
        _at_size("57x64x96", SPEC_1_0),
        "57x64x96",
        "57 frames: the model was trained on 8N+1, up to 49",
    ),
}


DOCS = Path(__file__).parents[2] / "docs" / "dataset-format.md"
EXAMPLES = dict(re.findall(r"^\| `([a-z0-9-]+)` \|[^|]*\|[^|]*\| (.*) \|$", DOCS.read_text(), re.MULTILINE))
"""The table of findings in the docs: an example for each."""


@pytest.mark.parametrize("code", FINDINGS)
def test_each_kind_of_fault_is_found_and_told(tmp_path: Path, code: str) -> None:
    build, where, message = CASES[code]
    report = build(tmp_path)
    found = next(found for found in report.findings if found.code == code)
    assert found.where == where.replace("ROOT", str(tmp_path))
    assert fnmatchcase(found.message, message.replace("ROOT", str(tmp_path))), found.message
    assert found.severity == FINDINGS[code].severity
    assert report.ok == all(found.severity != "error" for found in report.findings)
    related = {
        "copied-video",
        "listed-twice",
        "same-caption",
        "stray-caption",
        "one-word-caption",
        "only-part",
        "left-out",
    }
    assert {other.code for other in report.findings} <= {code} | related
    told = f"{found.where}: {found.message}".replace(str(tmp_path), "data")
    assert _without_figures(told) == _without_figures(EXAMPLES[code]), "docs/dataset-format.md tells it otherwise"


def _without_figures(text: str) -> str:
    """Sizes of files differ between encoders."""
    return re.sub(r"[\d.,]*\d", "0", text)


def test_a_code_without_a_row_is_refused() -> None:
    with pytest.raises(KeyError):
        finding("made-up", "a", "b")


def test_a_sound_dataset_has_no_findings(tmp_path: Path) -> None:
    lists(tmp_path, ["A black frame.", "Another one."], ["a.mp4", "b.mp4"], ["a.png", "b.jpg"])
    for name, image in (("a", "a.png"), ("b", "b.jpg")):
        clip(tmp_path / f"{name}.mp4", grey=ord(name))
        Image.new("RGB", (96, 64)).save(tmp_path / image)
    report = check(tmp_path, spec=SPEC_1_0)
    assert report.ok
    assert report.findings == ()
    assert report.counts == {"samples": 2, "clips": 2, "error": 0, "warning": 0, "note": 0}
    assert [(name, info.num_frames) for name, info in report.infos.items()] == [("a", 12), ("b", 12)]


def test_all_faults_are_told_at_once_worst_first(tmp_path: Path) -> None:
    lists(
        tmp_path,
        ["word", "A frame.", "A frame.", "Fine as it is.", "Gone away."],
        ["slow.mp4", "empty.mp4", "short.mp4", "../out.mp4", "gone.mp4"],
    )
    clip(tmp_path / "slow.mp4", fps=4)
    (tmp_path / "empty.mp4").write_bytes(b"")
    clip(tmp_path / "short.mp4", count=5, height=128)
    report = check(tmp_path)
    assert [(found.severity, found.code, found.where) for found in report.findings] == [
        ("error", "outside-folder", "videos.txt:4"),
        ("error", "empty-video", "empty"),
        ("error", "too-short", "short"),
        ("error", "missing-video", "gone"),
        ("warning", "slow", "slow"),
        ("warning", "one-word-caption", "slow"),
        ("warning", "cropped", "short"),
        ("note", "same-caption", "empty"),
    ]
    assert not report.ok
    assert report.counts == {"samples": 4, "clips": 2, "error": 4, "warning": 3, "note": 1}


def test_the_report_does_not_depend_on_the_workers(clips: Path) -> None:
    dataset = read_dataset(clips)
    assert check_dataset(dataset, SETTINGS, workers=1) == check_dataset(dataset, SETTINGS, workers=8)


def test_a_report_is_json_with_a_stable_schema(tmp_path: Path) -> None:
    lists(tmp_path, ["A black frame.", "café"], ["a.mp4", "gone.mp4"])
    clip(tmp_path / "a.mp4")
    value = json.loads(json.dumps(check(tmp_path).to_json()))
    assert value == {
        "version": 1,
        "dataset": str(tmp_path),
        "layout": "lists",
        "ok": False,
        "counts": {"samples": 2, "clips": 1, "error": 1, "warning": 1, "note": 0},
        "findings": [
            {
                "code": "missing-video",
                "severity": "error",
                "where": "gone",
                "message": "gone.mp4 does not exist",
                "hint": f"paths are relative to {tmp_path}",
            },
            {
                "code": "one-word-caption",
                "severity": "warning",
                "where": "gone",
                "message": "has a caption of one word: 'café'",
                "hint": "describe what the clip shows in a sentence or more",
            },
        ],
        "clips": [
            {
                "id": "a",
                "num_frames": 12,
                "fps": 8.0,
                "height": 64,
                "width": 96,
                "duration": 1.5,
                "codec": "h264",
                "pixel_format": "yuv420p",
                "rotation": 0,
                "pixel_aspect": 1.0,
                "bits": 8,
                "hdr": "",
                "alpha": False,
                "uneven": 0.0,
                "mirrored": False,
                "interlaced": False,
                "rate_told": True,
                "files": 1,
                "trimmed": False,
                "streams": 1,
            }
        ],
    }


@pytest.mark.parametrize(
    ("count", "fps", "start", "message", "hint"),
    [
        (75, 30, 0, "gives 20 frames at 8 fps, but", "use a longer clip, or train on 17 frames"),
        (24, 8, 0, "gives 24 frames at 8 fps, but", "use a longer clip, or train on 17 frames"),
        (24, 8, 15, "gives 9 frames at 8 fps from frame 15 on, but", "use a longer clip, or train on 9 frames"),
        (8, 8, 0, "gives 8 frames", "use a longer clip, or remove it"),
        (
            20,
            8,
            30,
            "gives 0 frames at 8 fps from frame 30 on",
            "skip fewer frames, use a longer clip, or remove it",
        ),
    ],
)
def test_a_clip_too_short_says_how_many_frames_it_gives(
    tmp_path: Path, count: int, fps: float, start: int, message: str, hint: str
) -> None:
    lists(tmp_path, ["A black frame."], ["a.mp4"])
    clip(tmp_path / "a.mp4", count=count, fps=fps)
    report = check(tmp_path, FrameSettings(size=Size(25, 64, 96), fps=8, skip_start=start))
    (found,) = report.findings
    assert found.message.startswith(message)
    assert found.hint == hint


def test_what_nearly_fits_is_left_alone(tmp_path: Path) -> None:
    """A rate 5 % below, a quarter of the frame cropped, 226 tokens and the very size are all fine."""
    lists(tmp_path, ["word " * 167], ["a.mp4"])
    clip(tmp_path / "a.mp4", height=64, width=128, fps=23.976)
    assert check(tmp_path, FrameSettings(size=Size(9, 64, 96), fps=24)).findings == ()


def test_captions_are_counted_by_the_tokenizer_where_there_is_one(tmp_path: Path) -> None:
    lists(tmp_path, ["word " * 168, "two words"], ["a.mp4", "b.mp4"])
    for name in "ab":
        clip(tmp_path / f"{name}.mp4", grey=ord(name))
    dataset = read_dataset(tmp_path)
    assert check_dataset(dataset, SETTINGS, count_tokens=lambda captions: [226] * len(captions)).findings == ()
    report = check_dataset(dataset, SETTINGS, SPEC_1_0, count_tokens=lambda captions: [227] * len(captions))
    assert [found.message for found in report.findings] == [
        "has a caption of 168 words, 227 tokens; the model reads 226",
        "has a caption of 2 words, 227 tokens; the model reads 226",
    ]


@pytest.mark.parametrize(
    "caption",
    [
        "这是一只在河上吹口哨的老鼠",
        "Пароход свистит на реке",
        "蒸気船が川で whistle を鳴らす",
        "Ein Dampfer fährt auf dem Fluss und pfeift laut.",
        "Un bateau à vapeur siffle sur la rivière dans le matin.",
        "Un barco de vapor silba en el río por la mañana.",
        "Um barco a vapor apita no rio com uma bandeira em cima.",
        "Een stoomboot vaart op het water en fluit naar de wal.",
        "Parowiec gwiżdże na rzece i nie staje przez cały dzień.",
    ],
)
def test_captions_in_other_languages_are_told(caption: str) -> None:
    assert not_english(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a",
        "猫",
        "Los Angeles at night.",
        "El Niño: la mer, le soleil, a film by Jean de la Fontaine that is on in Los Angeles.",
        "1girl, solo, masterpiece, best quality, blue sky, river, steamboat, whistle, mouse",
        "A sign that says “停止” hangs over the door of a café in the old town.",
        "Mickey Mouse dances, whistles, turns the wheel; Minnie waves, laughs, sings, runs.",
        "In a garden, die and dice lie on the table as a mouse in a red coat rolls them.",
        "ﬁne \uff34\uff45\uff58\uff54 in wide letters",
    ],
)
def test_captions_that_may_be_english_are_left_alone(caption: str) -> None:
    assert not not_english(caption)


def test_captions_are_alike_but_for_their_spelling() -> None:
    assert normal_form(" A  Mouse,\nwhistling… ") == normal_form("a mouse whistling") == "a mouse whistling"
    assert normal_form("a mouse") != normal_form("the mouse")
    assert normal_form("…") == ""


def test_clips_of_one_length_are_copies_only_if_their_bytes_are_the_same(tmp_path: Path) -> None:
    lists(tmp_path, ["One frame.", "Two frames.", "Three frames."], ["a.mp4", "b.mp4", "c.mp4"])
    data = clip(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data + b"x")
    (tmp_path / "c.mp4").write_bytes(data + b"y")
    assert check(tmp_path).findings == ()
    (tmp_path / "c.mp4").write_bytes(data + b"x")
    assert [(found.code, found.where, found.message) for found in check(tmp_path).findings] == [
        ("copied-video", "c", "has the same content as b")
    ]


def test_the_bytes_of_copies_are_read_once_if_that_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    lists(root, ["One frame.", "Two frames."], ["a.mp4", "b.mp4"])
    (root / "b.mp4").write_bytes(clip(root / "a.mp4").read_bytes())
    read: list[Path] = []
    monkeypatch.setattr("cogtune.data.cache.facts.digest_file", lambda path: read.append(path) or "same")
    for _ in range(2):
        facts = Facts(tmp_path / "files.json")
        report = check_dataset(read_dataset(root), SETTINGS, facts=facts)
        facts.save()
        assert [found.code for found in report.findings] == ["copied-video"]
    assert read == [root / "a.mp4", root / "b.mp4"]


LEARNED = (
    "this model has learned positions, which only work at 49x480x720 "
    "(diffusers uses others at another number of frames)"
)


@pytest.mark.parametrize(
    ("variant", "size", "told"),
    [
        ("2b", "50x480x720", "50 frames: the number must be 8N+1, such as 49"),
        ("2b", "49x480x724", "width 724 must be a multiple of 16, such as 720"),
        ("5b-i2v", "49x480x736", LEARNED),
        ("5b-i2v", "41x480x720", LEARNED),
        ("2b", "49x256x256", "256x256: the model was trained at 480x720"),
        ("5b", "49x768x1360", "768x1360: the model was trained at 480x720"),
        ("1.5-5b", "81x576x1024", "576x1024: the model was trained at 768x1360"),
        ("1.5-5b-i2v", "81x576x1024", "576x1024: the model was trained with sides of 768 and 768 to 1360"),
        ("1.5-5b", "80x768x1360", "80 frames: the number must be 8N+1, such as 81"),
        ("1.5-5b", "73x768x1360", "73 frames: the model was trained on 16N+1, up to 161"),
    ],
)
def test_sizes_that_a_model_does_not_take_are_told(tmp_path: Path, variant: str, size: str, told: str) -> None:
    lists(tmp_path, ["A black frame."], ["a.mp4"])
    clip(tmp_path / "a.mp4")
    report = check(tmp_path, FrameSettings(size=Size.parse(size), fps=8), published_spec(VARIANTS[variant]))
    assert [found.message for found in report.findings if found.code in ("model-size", "model-advice")] == [told]


def test_a_short_clip_of_a_model_with_one_size_gets_no_advice_on_frames(tmp_path: Path) -> None:
    lists(tmp_path, ["A black frame."], ["a.mp4"])
    clip(tmp_path / "a.mp4", count=41)
    settings = FrameSettings(size=Size(49, 480, 720), fps=8)
    hints = {}
    for variant in ("5b", "5b-i2v"):
        report = check(tmp_path, settings, published_spec(VARIANTS[variant]))
        (hints[variant],) = [found.hint for found in report.findings if found.code == "too-short"]
    assert hints == {
        "5b": "use a longer clip, or train on 41 frames",
        "5b-i2v": "use a longer clip, or remove it",
    }


def test_the_specs_own_text_length_counts(tmp_path: Path) -> None:
    lists(tmp_path, ["word " * 20], ["a.mp4"])
    clip(tmp_path / "a.mp4")
    short = ModelSpec(**{**SPEC_1_0.to_dict(), "max_text_seq_length": 20})
    (found,) = check(tmp_path, spec=short).findings
    assert found.message == "has a caption of 20 words, about 27 tokens; the model reads 20"


def test_items_are_listed_in_words() -> None:
    assert listed([3]) == "3"
    assert listed([3, 7, 9]) == "3, 7 and 9"
    assert listed(list(range(12)), most=3) == "0, 1, 2 and 9 more"


def test_findings_know_how_bad_they_are() -> None:
    assert SEVERITIES == ("error", "warning", "note")
    assert finding("slow", "a", "b", "c") == Finding("slow", "warning", "a", "b", "c")


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("mouse", 1),
        ("a small mouse runs", 4),
        ("一只红色的球慢慢滚过草地", 12),
        ("赤い球がゆっくり転がる", 11),
        ("ลูกบอลสีแดงกลิ้งช้าๆ", 20),
        ("红球 rolls", 3),
        ("", 0),
    ],
)
def test_scripts_without_blanks_are_not_one_word(caption: str, words: int) -> None:
    assert count_words(caption) == words
