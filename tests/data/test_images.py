"""Stills come out at their right brightness or are refused, and what is dropped of them gets a warning."""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cogtune
from cogtune.commands.infer.filling import fill_in
from cogtune.commands.infer.request import InferRequest
from cogtune.commands.validate import validation_set
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.facts import Facts
from cogtune.data.frames import FrameSettings
from cogtune.data.sources import Dataset, read_dataset
from cogtune.data.validation.checks import ValidationReport, check_dataset
from cogtune.data.video.clips import NotAVideo, probe, write_video
from cogtune.data.video.images import ImageInfo, image_warnings, measure_image, read_image
from cogtune.data.video.stamp import FileChanged, stamp_of
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.geometry import Size
from cogtune.system.errors import CogtuneError, UsageError
from tests.support import containers

RAMP = np.linspace(0, 65535, 64 * 48).round().astype(np.uint16).reshape(48, 64)
"""Grey of 16 bits from black to white."""

EIGHT_BITS = np.rint(RAMP / 257).astype(int)


def sixteen(path: Path, levels: np.ndarray = RAMP, **options: Any) -> Path:
    Image.fromarray(levels).save(path, **options)
    return path


def retagged(path: Path, tag: int, value: int) -> Path:
    """A TIFF with another value of a tag of one short number."""
    data = bytearray(path.read_bytes())
    entry = data.index(tag.to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little"))
    data[entry + 8 : entry + 10] = value.to_bytes(2, "little")
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm", "a.jp2"])
def test_grey_of_sixteen_bits_is_scaled(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"irreversible": False} if name == "a.jp2" else {}
    pixels = read_image(sixteen(tmp_path / name, **options))
    assert pixels.shape == (48, 64, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - EIGHT_BITS[..., np.newaxis]).max() <= 1


def test_a_tiff_whose_white_is_zero_is_not_a_negative(tmp_path: Path) -> None:
    path = retagged(sixteen(tmp_path / "a.tiff"), 262, 0)
    assert np.abs(read_image(path)[..., 0].astype(int) - (255 - EIGHT_BITS)).max() <= 1


def test_white_of_twelve_bits_is_white(tmp_path: Path) -> None:
    path = retagged(sixteen(tmp_path / "a.tiff", np.full_like(RAMP, 65535)), 258, 12)
    with Image.open(path) as image:
        assert np.asarray(image).max() == 4095
    assert read_image(path).min() == 255


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_stay_so_in_every_mode(tmp_path: Path, mode: str, level: int) -> None:
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (24, 16), (level,) * 3).convert(mode).save(path)
    assert np.array_equal(read_image(path), np.full((16, 24, 3), level))


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (RAMP.astype(np.int32), "its pixels are 32-bit integers"),
        ((RAMP / 65535).astype(np.float32), "its pixels are floating-point numbers"),
    ],
)
def test_pixels_whose_white_is_not_known_are_refused(tmp_path: Path, pixels: np.ndarray, reason: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    for read in (read_image, lambda path: measure_image(path, full=False)):
        with pytest.raises(CogtuneError, match=rf"a\.tiff: {reason} of unknown range") as caught:
            read(tmp_path / "a.tiff")
        assert "8 bits" in caught.value.hint


def test_lab_colours_are_refused(tmp_path: Path) -> None:
    Image.new("LAB", (8, 8)).save(tmp_path / "a.tiff")
    with pytest.raises(CogtuneError, match=r"its pixels are CIE L\*a\*b\*"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "a HEIC image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (b"\xff\x0a\x01", "a JPEG XL image"),
        (b"\x76\x2f\x31\x01\x02\0\0\0", "an OpenEXR image"),
        (b"\0\0\0\x18ftypcrx \0\0\0\x01", "a camera's raw image"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing"),
        (b"#?RADIANCE\n", "a Radiance HDR image"),
        (b"%PDF-1.7\n", "a PDF"),
    ],
)
def test_a_format_that_is_not_read_is_named(tmp_path: Path, start: bytes, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(start + bytes(600))
    for read in (read_image, lambda path: measure_image(path, full=False)):
        with pytest.raises(CogtuneError, match=rf"a\.png: it is {kind}, which is not supported") as caught:
            read(path)
        assert "save it as a PNG" in caught.value.hint
    with pytest.raises(NotAVideo, match=f"is {kind}, not a clip"):
        probe(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.webm", "a.wmv", "a.flv"])
def test_a_clip_in_place_of_an_image_is_called_a_video(tmp_path: Path, name: str) -> None:
    path = containers.clip(tmp_path / name).rename(tmp_path / "a.png")
    with pytest.raises(CogtuneError, match=r"a\.png is a video, not an image"):
        read_image(path)


def test_an_empty_image_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(CogtuneError, match=r"a\.png: it is empty"):
        read_image(tmp_path / "a.png")


# -------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("depth", [8, 16])
def test_every_exif_orientation_is_applied(tmp_path: Path, orientation: int, depth: int) -> None:
    stored = np.zeros((16, 24), np.uint16)
    stored[:8, :6], stored[:8, 18:], stored[8:, :6] = 60000, 40000, 20000
    stored = stored if depth == 16 else (stored / 257).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    ways: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda picture: picture,
        2: np.fliplr,
        3: lambda picture: np.rot90(picture, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda picture: np.rot90(picture, -1),
        7: lambda picture: np.rot90(picture, 2).T,
        8: np.rot90,
    }
    expected = np.rint(ways[orientation](stored) / (257 if depth == 16 else 1))
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0], expected)
    assert measure_image(tmp_path / "a.png", full=False) == ImageInfo(*expected.shape)


# ------------------------------------------------------------------------------------------------- transparency


def cutout(path: Path, mode: str = "RGBA", alpha: int = 0) -> Path:
    """Red, and see-through in its left half unless ``alpha`` says otherwise."""
    picture = Image.new("RGBA", (96, 64), (255, 0, 0, 255))
    picture.paste((255, 0, 0, alpha), (0, 0, 48, 64))
    if mode == "P":
        indexed = Image.new("P", (96, 64), 1)
        indexed.putpalette([255, 0, 0, 255, 0, 0])
        indexed.paste(0, (0, 0, 48, 64))
        indexed.save(path, transparency=0)
    elif mode == "RGB":
        picture.convert("RGB").save(path, transparency=(255, 0, 0))
    else:
        picture.convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_an_image_that_is_see_through_somewhere_is_known(tmp_path: Path, mode: str) -> None:
    path = cutout(tmp_path / "a.png", mode)
    assert measure_image(path, full=False) == ImageInfo(64, 96, mode)
    assert np.array_equal(read_image(path)[0, 0], (76, 76, 76) if mode == "LA" else (255, 0, 0))


def test_an_opaque_image_gets_no_warning(tmp_path: Path) -> None:
    assert measure_image(cutout(tmp_path / "a.png", alpha=255), full=True).transparency == ""


def dataset(root: Path) -> Dataset:
    root.mkdir(exist_ok=True)
    write_video(root / "a.mp4", np.zeros((12, 64, 96, 3), np.uint8), 8)
    (root / "prompts.txt").write_text("A black frame.\n")
    (root / "videos.txt").write_text("a.mp4\n")
    (root / "images.txt").write_text("a.png\n")
    return read_dataset(root)


def check(root: Path, facts: Facts | None = None) -> ValidationReport:
    return check_dataset(dataset(root), FrameSettings(size=Size(9, 64, 96), fps=8), facts=facts)


def test_validate_warns_of_transparency_and_remembers_it(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    cutout(root / "a.png")
    facts = Facts(tmp_path / "files.json")
    for _ in range(2):
        (found,) = check(root, facts).findings
        assert (found.code, found.where) == ("alpha", "a")
        assert (
            found.message == "has an image with transparency (RGBA), which is dropped; the colours beneath it are used"
        )
        facts.save()
        facts = Facts(tmp_path / "files.json")


def test_the_image_of_a_sample_video_is_looked_at_before_a_run(
    tmp_path: Path, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cutout(tmp_path / "see-through.png")
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / "float.tiff")
    data = dataset(tmp_path / "data")
    wanted: dict[str, Any] = {"validation_prompts": "one:::two", "data": tmp_path / "data"}
    config = RunConfig(**wanted, validation_images=f"{tmp_path / 'see-through.png'}:::{tmp_path / 'float.tiff'}")
    with pytest.raises(UsageError) as caught:
        validation_set(config, read_spec(tiny("5b-i2v")), data)
    (problem,) = caught.value.details
    assert "float.tiff: its pixels are floating-point numbers" in problem
    assert "see-through.png has transparency (RGBA), which is dropped" in capsys.readouterr().err


def test_infer_warns_of_transparency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = cutout(tmp_path / "a.png")
    fill_in(InferRequest(model="tiny:5b-i2v", prompts=("x",), images=(image,)))
    assert "a.png has transparency (RGBA), which is dropped, so the video starts from" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- size


def test_a_picture_that_is_too_large_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (30_000, 30_000)).save(path)
    for read in (read_image, lambda path: measure_image(path, full=True)):
        with pytest.raises(
            CogtuneError, match=r"it is too large \(900,000,000 pixels, but at most 178,956,970 are supported"
        ):
            read(path)


def test_a_large_picture_is_read_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (10_000, 9_000)).save(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert measure_image(path, full=False) == ImageInfo(9_000, 10_000)
    assert caught == []


# ------------------------------------------------------------------------------------------------------ exchange


def test_an_image_that_was_exchanged_is_not_read(tmp_path: Path) -> None:
    path = sixteen(tmp_path / "a.png")
    stamp = stamp_of(path)
    assert read_image(path, stamp).shape == (48, 64, 3)
    other = sixteen(tmp_path / "b.png")
    os.utime(other, ns=(stamp[1], stamp[1]))
    other.replace(path)  # as long, and as old
    with pytest.raises(FileChanged, match=r"a\.png changed while it was being read"):
        read_image(path, stamp)


def test_there_is_one_reader_of_stills() -> None:
    """Pillow opens files in one module, so that what is said of stills here holds wherever they come from."""
    package = Path(cogtune.__file__).parent
    opening = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "open" and ast.unparse(node.value).endswith("Image"):
                opening.add(path.relative_to(package).as_posix())
    assert opening == {"data/video/images.py"}


# ------------------------------------------------------------------------------------------ colours and pictures


def profile(
    red: tuple[float, float, float], green: tuple[float, float, float], blue: tuple[float, float, float]
) -> bytes:
    """An ICC profile (version 2) of a screen with these primaries in XYZ and a gamma of 2.2."""

    def fixed(value: float) -> bytes:
        return round(value * 65536).to_bytes(4, "big", signed=True)

    def place(x: float, y: float, z: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(x) + fixed(y) + fixed(z)

    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(2.2 * 256).to_bytes(2, "big") + b"\0\0"
    text = b"wide\0"
    described = b"desc\0\0\0\0" + len(text).to_bytes(4, "big") + text + bytes(79 + 3)
    tags = {b"desc": described, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": place(0.9642, 1.0, 0.8249)}
    tags |= {b"rXYZ": place(*red), b"gXYZ": place(*green), b"bXYZ": place(*blue)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data = len(tags).to_bytes(4, "big"), b""
    for name, value in tags.items():
        begin = 128 + 4 + 12 * len(tags) + len(data)
        table += name + begin.to_bytes(4, "big") + len(value).to_bytes(4, "big")
        data += value + bytes(-len(value) % 4)
    head = (128 + len(table) + len(data)).to_bytes(4, "big") + b"\0\0\0\0\x02\x40\0\0mntrRGB XYZ " + bytes(12)
    head += b"acsp" + bytes(28) + fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    return head.ljust(128, b"\0") + table + data


DISPLAY_P3 = profile((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "see-through.png"])
def test_colours_of_another_space_become_srgb(tmp_path: Path, name: str) -> None:
    """Display P3's orange of (255, 127, 0) is out of sRGB in red alone, and less green and blue there."""
    picture = Image.new("RGBA" if name[0] == "s" else "RGB", (32, 32), (200, 127, 80, 0)[: 4 if name[0] == "s" else 3])
    picture.save(tmp_path / name, icc_profile=DISPLAY_P3)
    pixel = read_image(tmp_path / name)[16, 16].astype(int)
    assert np.abs(pixel - (214, 124, 70)).max() <= (5 if name == "a.jpg" else 2)


def test_a_profile_that_does_not_belong_to_the_picture_is_none(tmp_path: Path) -> None:
    for number, (mode, data) in enumerate((("RGB", b"no profile"), ("L", DISPLAY_P3), ("CMYK", DISPLAY_P3))):
        path = tmp_path / f"{number}.jpg"
        picture = Image.new(mode, (32, 32), 127 if mode == "L" else (90, 90, 90, 0)[: len(mode)])
        picture.save(path, icc_profile=data, quality=100)
        picture.save(plain := tmp_path / f"plain{number}.jpg", quality=100)
        assert np.array_equal(read_image(path), read_image(plain))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_an_image_of_several_pictures_is_known_and_its_first_read(tmp_path: Path, name: str) -> None:
    pictures = [Image.new("RGB", (96, 64), (shade, 0, 0)) for shade in (40, 120, 200)]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], lossless=True)
    assert measure_image(tmp_path / name, full=False) == ImageInfo(64, 96, pictures=3)
    assert np.array_equal(read_image(tmp_path / name)[0, 0], (40, 0, 0))
    assert image_warnings(tmp_path / name) == [f"{tmp_path / name} holds 3 pictures; the video starts from the first"]


def test_the_small_copies_behind_a_photograph_are_no_pictures(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (96, 64)), Image.new("RGB", (48, 32))]
    pictures[0].save(tmp_path / "a.mpo", save_all=True, append_images=pictures[1:])
    assert measure_image(tmp_path / "a.mpo", full=False) == ImageInfo(64, 96)
