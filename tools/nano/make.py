"""Make all of nano, or go on with it: python -m tools.nano.make --parts build/nano --seconds 580

Text encoder, VAE and clips are made at the same time, then the caches are filled, then the transformers are trained:
that of 5b first, and from it the others, spread over the GPUs that are there; at last each is scored. What is done is
not done again, and what was begun goes on, so the same command can be given until it says that nothing is left.
``--smoke`` does all of it in a minute or two and badly, to see that it runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cogtune.models.nano_models import transformer_part
from cogtune.models.variants import NANO_VARIANTS
from tools.nano.common import Deadline, recorded, say

_HOME = Path(__file__).parents[2]
"""The folder that holds ``tools``."""
_FIRST = "5b"
"""The variant whose transformer the others start from."""
_LATER_RATE = 0.6
"""Their learning rate, in that of the first."""
_LEAST_SECONDS = 120.0
"""Time that is worth a start."""


class Started:
    """A script at work, its output in a log beside the parts."""

    def __init__(self, parts: Path, gpu: int | None, script: str, *arguments: object) -> None:
        self.name = " ".join([script, *map(str, arguments[:1])])
        self.log = parts / "logs" / f"{self.name.replace(' ', '-')}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
        command = [sys.executable, "-m", f"tools.nano.{script}", *map(str, arguments)]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        say(f"started {self.name}")

    def wait(self) -> bool:
        """Return whether it ended well; the last lines of its log are shown either way."""
        code = self.process.wait()
        last = self.log.read_text(errors="replace").splitlines()[-(3 if code == 0 else 25) :]
        say("\n    ".join([f"{self.name} ended with {code}", *last]))
        return code == 0


def all_well(started: Sequence[Started]) -> bool:
    ends = [one.wait() for one in started]
    return all(ends)


def foundations(given: argparse.Namespace, gpus: list[int | None]) -> bool:
    """Text encoder, VAE and clips."""
    record = recorded(given.parts)
    started = [
        Started(
            given.parts, gpus[0], "prepare", "--data", given.data, "--rounds", 0.004 if given.smoke else given.rounds
        )
    ]
    if "text_encoder" not in record:
        more = ["--steps", 20, "--batch-size", 16] if given.smoke else ["--steps", 4000, "--batch-size", 128]
        started.append(Started(given.parts, gpus[-1], "train_text", "--parts", given.parts, *more))
    if not record.get("vae", {}).get("done"):
        more = ["--steps", 12, "--judge", 2, "--reserve", 20] if given.smoke else []
        more += ["--batch-size", given.vae_batch_size]
        more += [] if given.vae_crop is None else ["--crop", given.vae_crop]
        more += [] if given.vae_start is None else ["--start", given.vae_start]
        arguments = ["--parts", given.parts, "--seconds", given.vae_seconds, *more]
        started.append(Started(given.parts, gpus[0], "train_vae", *arguments))
    return all_well(started)


def transformers(given: argparse.Namespace, gpus: list[int | None], deadline: Deadline, *, cache_only: bool) -> bool:
    """One run for each variant that is not done. Caches are filled one variant after another where they share one."""
    left = [name for name in given.variants if transformer_part(name) not in recorded(given.parts)]
    common = ["--parts", given.parts, "--data", given.data]
    common += ["--batch-size", given.batch_size, "--learning-rate", given.learning_rate]
    if cache_only:
        # 2b, 5b and 5b-i2v read the same entries, of which image-to-video needs the most; 1.5 has a cache of its own
        groups = [[name for name in left if name.startswith("1.5") == own] for own in (False, True)]
        most = [max(names, key=lambda name: name.endswith("-i2v")) for names in groups if names]
        return all_well(
            [
                Started(given.parts, gpus[number % len(gpus)], "train_transformer", name, *common, "--cache-only")
                for number, name in enumerate(most)
            ]
        )
    if given.smoke:
        common += ["--steps", 8, "--batch-size", 4]
    elif given.total_seconds is not None:
        common += ["--total-seconds", given.total_seconds]

    def trained(names: Sequence[str], *more: object) -> bool:
        words = [*common, "--seconds", max(60.0, deadline.left), *more]
        started = [
            Started(given.parts, gpus[number % len(gpus)], "train_transformer", name, *words, *paced(given, name))
            for number, name in enumerate(names)
        ]
        return all_well(started)

    first = given.parts / transformer_part(_FIRST)
    if _FIRST in left and not trained([_FIRST]):
        return False
    if (_FIRST in left and not first.is_dir()) or deadline.left < _LEAST_SECONDS:
        return True  # its time is up
    more = ["--start", first, "--learning-rate", given.learning_rate * _LATER_RATE] if first.is_dir() else []
    return trained([name for name in left if name != _FIRST], *more)


def paced(given: argparse.Namespace, name: str) -> list[object]:
    """The flag for a transformer whose pace is known."""
    return ["--pace", given.paces[name]] if name in given.paces else []


def paces(text: str) -> dict[str, float]:
    """Read such as ``2b=0.06,5b=0.06``."""
    return {name: float(seconds) for name, _, seconds in (part.partition("=") for part in text.split(","))}


def scores(given: argparse.Namespace, gpus: list[int | None]) -> bool:
    done = [name for name in given.variants if transformer_part(name) in recorded(given.parts)]
    missing = [name for name in done if not (given.parts / "scores" / f"{name}.json").is_file()]
    more = ["--count", 2, "--steps", 2] if given.smoke else []
    return all_well(
        [
            Started(given.parts, gpus[number % len(gpus)], "score", name, "--parts", given.parts, *more)
            for number, name in enumerate(missing)
        ]
    )


def archive(given: argparse.Namespace) -> None:
    """What has to outlive this machine, in files of less than 16 MiB: the parts, and each unfinished run."""
    given.archive.mkdir(parents=True, exist_ok=True)
    kept = [path for path in given.parts.iterdir() if path.name not in ("runs", "data", "vae-state.pt")]
    with tarfile.open(given.archive / "parts.tar", "w") as tar:
        for path in kept:
            tar.add(path, path.name)
    for run in sorted((given.parts / "runs").glob("*")):
        if transformer_part(run.name) not in recorded(given.parts):
            with tarfile.open(given.archive / f"run-{run.name}.tar.gz", "w:gz") as tar:
                for part in sorted(path for path in run.iterdir() if path.name != "model"):  # which is made anew
                    tar.add(part, f"runs/{run.name}/{part.name}")
    for path in sorted(given.archive.glob("*.tar*")):
        say(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def restore(given: argparse.Namespace) -> None:
    for path in sorted(given.restore.glob("*.tar*")):
        with tarfile.open(path) as tar:
            tar.extractall(given.parts, filter="data")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="[default: PARTS/data]")
    parser.add_argument("--seconds", type=float, default=580.0, help="of this call")
    parser.add_argument("--vae-seconds", type=float, default=300.0)
    parser.add_argument("--total-seconds", type=float, help="of training a transformer, over all calls")
    parser.add_argument("--vae-start", type=Path, help="parts whose VAE to start from, in place of random weights")
    parser.add_argument("--until", choices=["foundations", "cache", "train", "score"], default="score")
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(NANO_VARIANTS))
    parser.add_argument("--archive", type=Path, help="folder for archives of what was made")
    parser.add_argument("--restore", type=Path, help="folder of such archives, to go on from")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--rounds", type=float, default=4.0, help="how often each subject is drawn for the transformers"
    )
    parser.add_argument("--vae-batch-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=384, help="of the transformers")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="of the transformers")
    parser.add_argument("--paces", type=paces, default={}, help="seconds of a step, such as 2b=0.06,5b=0.06")
    parser.add_argument("--vae-crop", help="for a trial on a CPU, such as 9x32x32")
    given = parser.parse_args()
    given.data = given.data or given.parts / "data"
    given.parts.mkdir(parents=True, exist_ok=True)
    if given.restore is not None:
        restore(given)
    deadline = Deadline(given.seconds)
    gpus: list[int | None] = list(range(torch.cuda.device_count())) or [None]
    stages: dict[str, Callable[[], bool]] = {
        "foundations": lambda: foundations(given, gpus),
        "cache": lambda: transformers(given, gpus, deadline, cache_only=True),
        "train": lambda: transformers(given, gpus, deadline, cache_only=False),
        "score": lambda: scores(given, gpus),
    }
    well = True
    for name, stage in stages.items():
        say(f"{name}: {deadline.left:.0f} s left")
        well = stage()
        if not well or name == given.until:
            break
    if given.archive is not None:
        archive(given)
    left = [name for name in given.variants if transformer_part(name) not in recorded(given.parts)]
    say("nothing is left to do" if well and not left else f"left: {', '.join(left) or 'see the logs'}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
