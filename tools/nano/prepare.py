"""Draw the clips that nano's transformers are trained on: python -m tools.nano.prepare --data build/nano/data

Clips are real mp4 files with captions, read and encoded as anyone's own: `cogtune dataset cache` follows, which
train_transformer.py starts by itself. Every subject of the world that is not held out comes equally often.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cogtune.data.nano import world
from cogtune.data.sources import CAPTIONS, VIDEOS
from cogtune.data.video.clips import write_video
from cogtune.system.digests import digest
from cogtune.system.files import write_text
from tools.nano.common import say


def write_clips(root: Path, seed: int, numbers: range) -> list[str]:
    """Write the clips of these scenes; their captions."""
    captions = []
    for number, scene in zip(numbers, world.training_scenes(seed, numbers), strict=True):
        write_video(root / clip_name(number), world.draw(scene), world.FPS)
        captions.append(scene.caption)
    return captions


def clip_name(number: int) -> str:
    return f"videos/{number // 1000:03d}/{number:06d}.mp4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=float, default=4.0, help="how often each of the 1,655 subjects comes")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    count = int(given.rounds * len(world.known_subjects()))
    facts = {"seed": given.seed, "clips": count, "world": world.WORLD_VERSION}
    done = given.data / "world.json"
    if done.is_file() and json.loads(done.read_text()).items() >= facts.items():
        say(f"{count} clips are there already")
        return
    starts = range(0, count, 50)
    with ProcessPoolExecutor(given.processes) as pool:
        blocks = [range(start, min(start + 50, count)) for start in starts]
        written = pool.map(write_clips, *zip(*((given.data, given.seed, block) for block in blocks), strict=True))
        captions = [caption for block in written for caption in block]
    write_text(given.data / VIDEOS, "".join(f"{clip_name(number)}\n" for number in range(count)))
    write_text(given.data / CAPTIONS, "".join(f"{caption}\n" for caption in captions))
    write_text(done, json.dumps(facts | {"captions": digest(captions)}, indent=1) + "\n")
    say(f"{count} clips drawn")


if __name__ == "__main__":
    main()
