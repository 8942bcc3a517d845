"""``cogtune demo``: everything from clips to a video on a tiny model, through the same functions as the commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cogtune.commands import cache, train, validate
from cogtune.config.resolving import resolve
from cogtune.data.synthetic import draw_dataset
from cogtune.system import console
from cogtune.system.errors import UsageError, counted
from cogtune.system.files import write_text
from cogtune.system.folders import remove_folder

MARK = ".cogtune-demo"
"""A file that marks a folder as made by the demo, which may replace it."""

PRESET = "cpu-lora-tiny"


def run(folder: Path) -> Iterator[str]:
    """Draw clips, check them, encode them, train a LoRA for 20 steps, sample a video; yields what was made.

    Raises:
        UsageError: the folder is there and was not made by a demo.
        CogtuneError: a step failed.
    """
    if folder.exists():
        if not (folder / MARK).is_file():
            raise UsageError(f"{folder} already exists", "pass another folder: `cogtune demo FOLDER`")
        remove_folder(folder)
    write_text(folder / MARK, "This folder was made by `cogtune demo` and may be deleted.\n")
    data, output, video = folder / "data", folder / "out", folder / "video.mp4"

    console.note("1/5 drawing six clips with captions")
    draw_dataset(data)
    flags = {"data": data, "output": output}
    resolved = resolve(preset_name=PRESET, flags=flags)
    console.note(f"2/5 checking them: cogtune dataset validate {data} --preset {PRESET}")
    report = validate.validate(resolved.config)
    console.note(f"    {counted(report.counts['clips'], 'clip')} opened, {counted(report.counts['error'], 'error')}")
    console.note(f"3/5 encoding them: cogtune dataset cache {data} --preset {PRESET}")
    console.note(f"    {cache.fill(resolved.config)}")
    console.note(f"4/5 training a LoRA: cogtune train --preset {PRESET} --data {data} --output {output}")
    made = train.train(resolved, resume=None, overwrite=False)
    console.note(f"5/5 sampling a video: cogtune infer --lora {output} --output {video}")
    from cogtune.commands.infer.making import generate
    from cogtune.commands.infer.request import InferRequest

    (sampled,) = generate(InferRequest(loras=(str(output),), steps=10, output=video))

    yield f"clips and captions   {data}"
    yield f"the run              {output}"
    yield f"LoRA weights         {made[0]}"
    yield f"launch files         {output / 'launch'}"
    yield f"sampled video        {video} ({sampled.size} at {sampled.fps:g} fps)"
    yield "The model has random weights and a few megabytes, so the video is noise; every step is real."
    yield "next, with a 24 GB GPU and your own clips in ./data: cogtune train --preset 4090-lora-5b"
