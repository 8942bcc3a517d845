"""``cogtune dataset bench``: how fast clips go through decoders, VAE and writer on this machine."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cogtune.bench.stage import measured_as
from cogtune.bench.watch import watched
from cogtune.config.run_config import RunConfig
from cogtune.data.sources import CAPTIONS, VIDEOS, read_dataset
from cogtune.data.video.clips import Pixels, write_video
from cogtune.encoding import jobs
from cogtune.encoding.decoders import default_workers
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.geometry import Size
from cogtune.models.random_configs import Scale
from cogtune.models.variants import Variant
from cogtune.run.plan import check_config, fps_of, size_of
from cogtune.system import console
from cogtune.system.children import end_with_creator, forking
from cogtune.system.files import os_errors_explained, write_text
from cogtune.system.gpus import gpus
from cogtune.system.scratch import scratch_folder

DRAWN = 4
"""Clips that are drawn; the others are the same pictures in files of other bytes."""

_PRELOAD = ("torch", "numpy", "av")

SOURCE_SCALE = 1.5
SOURCE_RATE = 3
"""The clips are this much larger than training takes them, and have this many times its frames a second."""


def bench_cache(config: RunConfig, *, clips: int, processes: int | None, keep: Path | None) -> dict[str, Any]:
    """Encode drawn clips into a fresh cache; figures by name, JSON-able.

    Args:
        config: a published or tiny ``model`` gets random weights.
        keep: a folder for the random model and the clips, which are used again when they are there.

    Raises:
        UsageError: the model's size is not known, or it cannot be encoded at that size.
        CogtuneError: encoding failed.
    """
    measured = measured_as(config.model)
    with scratch_folder("cogtune-bench-") as scratch:
        home = (keep or scratch).absolute()
        model = measured if isinstance(measured, Path) else _random_model(*measured, home)
        spec = read_spec(model)
        config = config.model_copy(update={"cache_dir": scratch / "cache", "data": home / "data"})
        check_config(config, spec)
        size, fps = size_of(config, spec), fps_of(config, spec)
        data = _draw(home / f"data-{size}-{clips}", size, fps, clips)
        prepared = jobs.prepare(config, spec, model, read_dataset(data))
        job = jobs.make_encode_plan(prepared, config, spec, model, processes=processes or max(1, len(gpus())))
        jobs.check_space(job, spec)
        console.note(f"encoding {prepared.todo}")
        with watched() as peaks:
            results = jobs.fill_cache(job)
    workers = config.workers if config.workers is not None else default_workers(job.options.processes)
    return {
        "gpu": gpus()[0].name if gpus() else "none",
        "model": config.model,
        "size": str(size),
        "workers": workers,
        **jobs.totals(results),
        "card_gb": [round(used / 1e9, 2) for used in peaks.cards],
        "host_gib": round(peaks.processes / 2**30, 2),
    }


def _random_model(row: Variant, scale: Scale, home: Path) -> Path:
    """Return the random model in ``home``, made by another process, so that the GPU is free again."""
    folder = home / f"{row.name}-{scale}"
    if not folder.is_dir():
        console.note(f"making a random {row.name}")
        with ProcessPoolExecutor(1, forking(_PRELOAD), end_with_creator) as pool:
            pool.submit(_write_model, row, folder, scale).result()
    return folder


def _write_model(row: Variant, folder: Path, scale: Scale) -> None:
    from cogtune.modeling.devices import best_device
    from cogtune.modeling.random_weights import write_for_encoding

    write_for_encoding(row, folder, scale=scale, device="cpu" if scale == "tiny" else best_device())


def _draw(folder: Path, size: Size, fps: float, clips: int) -> Path:
    """Return a dataset of ``clips`` different files, each long and large enough for ``size``."""
    if folder.is_dir() and (folder / CAPTIONS).is_file():
        return folder
    console.note("drawing clips")
    with ProcessPoolExecutor(min(DRAWN, default_workers()), forking(_PRELOAD), end_with_creator) as pool:
        drawn = list(pool.map(_drawn, [(folder / f"drawn-{number}.mp4", number, size, fps) for number in range(DRAWN)]))
    for number in range(clips):
        skipped = struct.pack(">I4sI", 12, b"free", number)  # a box that players pass over
        with os_errors_explained(folder):
            (folder / f"{number:04d}.mp4").write_bytes(drawn[number % DRAWN] + skipped)
    write_text(folder / VIDEOS, "".join(f"{number:04d}.mp4\n" for number in range(clips)))
    write_text(folder / CAPTIONS, "".join(f"clip number {number} of moving stripes\n" for number in range(clips)))
    return folder


def _drawn(what: tuple[Path, int, Size, float]) -> bytes:
    path, number, size, fps = what
    write_video(path, _stripes(number, size), SOURCE_RATE * fps)
    film = path.read_bytes()
    path.unlink()
    return film


def _stripes(number: int, size: Size) -> Iterator[Pixels]:
    height, width = (int(side * SOURCE_SCALE) // 2 * 2 for side in (size.height, size.width))
    y, x = np.mgrid[0:height, 0:width].astype(np.int32)
    for t in range(SOURCE_RATE * (size.num_frames - 1) + 1):
        planes = (x + 3 * t, y * (number + 1) + t, x + y - 2 * t)
        yield np.stack([(plane % 256).astype(np.uint8) for plane in planes], axis=-1)
