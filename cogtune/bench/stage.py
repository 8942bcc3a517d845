"""What a bench works on: a model, mostly of random weights, and a cache of random samples, made in a separate process.

Separate, so that the process that watches the GPU's memory takes none of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogtune.data.cache.index import Index, SampleKeys
from cogtune.data.cache.store import Store
from cogtune.models.checkpoint_configs import ModelSpec, read_spec
from cogtune.models.geometry import SPATIAL_COMPRESSION, Size, latent_frames
from cogtune.models.locate import locate
from cogtune.models.random_configs import Scale
from cogtune.models.variants import VARIANTS, Precision, Variant, built_in, published, variant
from cogtune.run.launch import ENVIRONMENT, LaunchFiles
from cogtune.system import processes
from cogtune.system.digests import digest
from cogtune.system.errors import UsageError, did_you_mean
from cogtune.system.json_files import read_json, write_json
from cogtune.system.processes import StopRequest, run_worker

SAMPLES = 4
NOTHING = "nothing was measured"
_LOG_VARIANCE = -6.0
"""Of the random latents' posterior: near to what a trained VAE says."""


def measured_as(model: str) -> Path | tuple[Variant, Scale]:
    """Return what a bench measures for ``model``: the folder of a local or nano model, as it is; or which random
    weights take the place of a published or tiny one.

    Raises:
        UsageError: it is none of these, so that its size is unknown.
        CogtuneError: the nano model cannot be made.
    """
    asked = built_in(model)
    if Path(model).is_dir() or (asked is not None and asked.kind == "nano"):
        return locate(model)
    if asked is not None:
        return asked.variant, "tiny"
    row = published(model)
    if row is None:
        raise UsageError(
            f"the size of {model} is unknown{did_you_mean(model, VARIANTS)}",
            f"use one of {', '.join(VARIANTS)}, or a local model folder",
        )
    return row, "full"


@dataclass(frozen=True)
class StagingJob:
    """What has to be made, and where."""

    model: str
    """Folder of the model; made when it is not there."""
    variant: str
    scale: str
    cache: str
    index: str
    size: str | None
    precision: Precision

    @property
    def is_done(self) -> bool:
        """Whether all of it is there; the index is written last."""
        return Path(self.model).is_dir() and Path(self.index).is_file()


def prepare(job: StagingJob, folder: Path) -> None:
    """Make it in a separate process, which leaves its log in ``folder``.

    Raises:
        CogtuneError: it failed.
    """
    files = LaunchFiles(folder)
    write_json(files.plan, asdict(job))
    processes.supervise(
        [sys.executable, "-m", "cogtune.bench.stage", str(files.plan)],
        [files.report(0)],
        files.log,
        environment=ENVIRONMENT,
        if_stopped=lambda: NOTHING,
    )


def make(job: StagingJob, stop: Callable[[], bool] = lambda: False) -> bool:
    """Write the model, unless it is there, and the samples; False when asked to stop in between, or at the end."""
    from cogtune.modeling.devices import best_device
    from cogtune.modeling.random_weights import write_for_training

    model = Path(job.model)
    if not model.is_dir():
        scale: Any = job.scale
        device = best_device() if scale == "full" else "cpu"
        write_for_training(variant(job.variant), model, scale=scale, device=device)
    if stop():
        return False
    spec = read_spec(model)
    size = Size.parse(job.size) if job.size else spec.native
    _write_samples(Store(Path(job.cache)), spec, size, job.precision).write(Path(job.index))
    return not stop()


def _write_samples(store: Store, spec: ModelSpec, size: Size, precision: Precision) -> Index:
    import torch

    from cogtune.modeling.devices import DTYPES

    dtype = DTYPES[precision]
    shape = (
        spec.out_channels,
        latent_frames(size.num_frames),
        size.height // SPATIAL_COMPRESSION,
        size.width // SPATIAL_COMPRESSION,
    )
    random = torch.Generator().manual_seed(0)

    def write_text(key: str) -> str:
        text = torch.randn(spec.max_text_seq_length, spec.text_embed_dim, generator=random)
        store.write("text", key, text.to(dtype))
        return key

    rows = []
    for number in range(SAMPLES):
        key = digest(["bench", number])
        mean = torch.randn(*shape, generator=random) / spec.scaling_factor
        store.write("latents", key, torch.cat([mean, torch.full(shape, _LOG_VARIANCE)]).to(dtype))
        if spec.image_to_video:
            pixels = torch.randint(256, (3, size.height, size.width), generator=random)
            store.write("image", key, pixels.to(torch.uint8))
        rows.append(SampleKeys(f"random {number}", key, write_text(key), key if spec.image_to_video else None, size))
    return Index(tuple(rows), write_text(digest("bench")))


def main(arguments: list[str] | None = None) -> int:
    """Do one job; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cogtune.bench.stage", description=__doc__)
    parser.add_argument("job", type=Path, help="the job's plan.json")
    path: Path = parser.parse_args(arguments).job
    files = LaunchFiles(path.parent)

    def work(stop: StopRequest) -> bool:
        stop.begins()
        return make(StagingJob(**read_json(path)), lambda: bool(stop))

    return run_worker(files.report(0), files.log, work)


if __name__ == "__main__":
    raise SystemExit(main())
