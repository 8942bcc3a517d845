"""How long an up-to-date cache of many samples takes to confirm, and how much memory: not a test, a measurement.

    python tools/cache_at_scale.py [SAMPLES]

Makes a dataset of that many clips (10,000 unless said otherwise) that are copies of one small clip in files of other
bytes, with a caption and an image each, and fills its cache with small entries. Then runs the real command on it, once
to get to know the files and once more, which is what is measured.
"""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save

from cogtune.config.resolving import resolve
from cogtune.data.cache.facts import Facts
from cogtune.data.cache.index import ClipJob, ImageJob, TextJob
from cogtune.data.cache.store import EntryKind
from cogtune.data.sources import read_dataset
from cogtune.data.synthetic import draw_dataset
from cogtune.data.video.clips import probe
from cogtune.encoding.jobs import prepare
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.locate import locate


def make(folder: Path, samples: int, model: Path) -> None:
    """A dataset and its cache; the files' facts are put down, so that no clip has to be opened for it."""
    film = next((draw_dataset(folder / "drawn", clips=1) / "videos").iterdir()).read_bytes()
    data = folder / "data"
    data.mkdir()
    Image.new("RGB", (96, 64)).save(data / "first.png")
    for number in range(samples):
        (data / f"{number}.mp4").write_bytes(film + struct.pack(">I4sI", 12, b"free", number))
    (data / "videos.txt").write_text("".join(f"{number}.mp4\n" for number in range(samples)))
    (data / "images.txt").write_text("first.png\n" * samples)
    (data / "prompts.txt").write_text("".join(f"number {number} of many drawn clips\n" for number in range(samples)))
    facts = Facts(data / ".cogtune" / "files.json")
    info = probe(data / "0.mp4")
    for number in range(samples):
        path = data / f"{number}.mp4"
        facts.learn_probe(path, info, facts.stamp(path))
    facts.save()
    config = resolve(
        preset_name="cpu-lora-tiny", flags={"data": data, "model": str(model)}
    ).config.with_absolute_paths()
    prepared = prepare(config, read_spec(model), model, read_dataset(data))
    todo, entry = prepared.todo, save({"data": torch.zeros(8)}, {"blake2b": "0" * 32})
    work: dict[EntryKind, Sequence[ClipJob | TextJob | ImageJob]] = {
        "latents": todo.clips,
        "text": todo.texts,
        "image": todo.images,
    }
    for kind, jobs in work.items():
        for job in jobs:
            path = prepared.store.path(kind, job.key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(entry)  # not synced, as the store would: ten thousand syncs take minutes


def processor_seconds() -> float:
    """Return what the processes that were started and have ended took of the processor."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure and print."""
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as scratch:
        model = locate("tiny:5b-i2v")
        make(Path(scratch), samples, model)
        data = str(Path(scratch) / "data")
        command = [
            sys.executable,
            "-m",
            "cogtune",
            "dataset",
            "cache",
            data,
            "--preset",
            "cpu-lora-tiny",
            "--model",
            str(model),
        ]
        for _ in range(2):
            start, before = time.perf_counter(), processor_seconds()
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds, work = time.perf_counter() - start, processor_seconds() - before
        assert "nothing to do" in told, told
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"{samples:,} samples confirmed in {seconds:.1f} s, {work:.1f} of work; {peak:.2f} GiB at the most")


if __name__ == "__main__":
    main()
