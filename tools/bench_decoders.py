"""How fast PyAV and decord read a clip, and whether it comes out the same: ``python tools/bench_decoders.py``.

For each clip, the median over a few rounds of: every frame; 49 frames at 8 a second from the first on, as training
takes them; and 9 frames at 8 a second from the clip's middle on. Processor time, one thread each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import av
import numpy as np

from cogtune.data.frames import FrameSettings, view
from cogtune.data.video.clips import Decoder, iter_frames, probe, read_frames
from cogtune.data.video.timing import at_rate
from cogtune.models.geometry import Size

DECODERS: tuple[Decoder, ...] = ("pyav", "decord")


def draw(path: Path, codec: str, height: int, width: int, seconds: int) -> Path:
    """Noise that drifts, with a key frame every 8 seconds."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 4, 3), np.uint8)
    picture = noise.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"g": "240", "preset": "veryfast"})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.colorspace = 1  # BT.709: HD without a tag is read by PyAV in any case
        for number in range(30 * seconds):
            left = 2 * number % width
            pixels = np.ascontiguousarray(picture[:height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def choices(path: Path) -> dict[str, list[int]]:
    """Return the frames that are read, by what that is called."""
    info = probe(path)
    head = view(info, FrameSettings(size=Size(min(49, int(info.duration * 8)), 16, 16), fps=8)).indices
    times = [info.time_of(index) for index in range(info.num_frames)]
    return {
        "all": list(range(info.num_frames)),
        "49 at 8 fps": list(head),
        "9 from the middle": at_rate(times, 8, info.num_frames // 2)[:9],
    }


def seconds(path: Path, indices: list[int], decoder: Decoder) -> float:
    """Processor time that reading these frames takes, which other programs do not change much."""
    begun = time.process_time()
    for _ in iter_frames(path, indices, decoder):
        pass
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path, nargs="*", help="by default, clips that are drawn")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        clips = options.clips or [
            draw(folder / "360p-6s.mp4", "libx264", 360, 640, 6),
            draw(folder / "720p-40s.mp4", "libx264", 720, 1280, 40),
        ]
        for path in clips:
            for name, indices in choices(path).items():
                taken: dict[Decoder, list[float]] = {decoder: [] for decoder in DECODERS}
                for _ in range(options.rounds):
                    for decoder in DECODERS:
                        taken[decoder].append(seconds(path, indices, decoder))
                sample = indices[:: max(1, len(indices) // 16)]
                first, second = (read_frames(path, sample, decoder) for decoder in DECODERS)
                figures = ", ".join(f"{decoder} {1000 * median(taken[decoder]):,.0f} ms" for decoder in DECODERS)
                same = "the same pixels" if np.array_equal(first, second) else "other pixels"
                print(f"{path.name}, {name} ({len(indices)} frames): {figures}; {same}", flush=True)


if __name__ == "__main__":
    main()
