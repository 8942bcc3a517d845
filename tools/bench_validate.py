"""How fast ``cogtune dataset validate`` is on this machine, and how much memory it takes: ``make bench-data``.

Clips are H.264 of 640x360 with 195 frames, drawn anew, or those of a folder given with --source.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from cogtune.bench.watch import watched
from cogtune.data.frames import FrameSettings
from cogtune.data.sources import read_dataset
from cogtune.data.validation.checks import ValidationReport, check_dataset
from cogtune.models.geometry import Size

SETTINGS = FrameSettings(size=Size(49, 352, 640), fps=8)
FRAMES, HEIGHT, WIDTH = 195, 360, 640


def draw(path: Path, seed: int) -> Path:
    """Soft shapes that drift: a first frame of about as many bits as an old film of this size has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 36, WIDTH // 18, 3), np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((WIDTH + 2 * FRAMES, HEIGHT), Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "27"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(FRAMES):
            pixels = np.ascontiguousarray(picture[:, 2 * number : 2 * number + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def lay_out(root: Path, sources: list[Path], count: int) -> None:
    """A dataset of ``count`` clips; no two have the same length or caption."""
    whole = [source.read_bytes() for source in sources]
    for number in range(count):
        (root / f"{number}.mp4").write_bytes(whole[number % len(whole)] + bytes(number))
        (root / f"{number}.txt").write_text(f"A picture that drifts to the left, number {number}.")


def measure(root: Path, *, full: bool) -> tuple[ValidationReport, float, float]:
    """Return the report, seconds, and GiB of this process and those it started."""
    dataset = read_dataset(root)
    with watched() as peaks:
        begun = time.perf_counter()
        report = check_dataset(dataset, SETTINGS, full=full)
        seconds = time.perf_counter() - begun
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report, seconds, (own + peaks.processes) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=3000, help="clips that are opened")
    parser.add_argument("--full-clips", type=int, default=100, help="clips that are decoded")
    parser.add_argument("--source", type=Path, help="a folder of clips to use in place of drawn ones")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sources = sorted(options.source.rglob("*.mp4")) if options.source else [draw(root / "a.mp4", 0)]
        for name, count, full in (("open", options.clips, False), ("decode", options.full_clips, True)):
            folder = root / name
            folder.mkdir()
            lay_out(folder, sources, count)
            report, seconds, memory = measure(folder, full=full)
            assert report.counts["error"] == 0, report.findings[:3]
            frames = sum(info.num_frames for info in report.infos.values())
            done, noun = (frames, "frames") if full else (count, "clips")
            print(f"{name}: {done / seconds:,.0f} {noun}/s ({done:,} in {seconds:.1f} s), {memory:.2f} GiB at most")


if __name__ == "__main__":
    main()
