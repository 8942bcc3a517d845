"""What a nano model draws when it is asked for combinations that it was never trained on.

    python -m tools.nano.score 5b --parts build/nano

Samples one video for each of the 64 held-out prompts, as `cogtune infer` does (the guides' scheduler, guidance 6), and
lets the detector read them. An image-to-video model is given the first frame of a drawn clip of the same subject.
Writes a table of what was read, figures, and a sheet of frames.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from PIL import Image

from cogtune.data.nano import detector, world
from cogtune.modeling.nano import write_nano
from cogtune.modeling.pipelines import pipeline_class, scheduler_for, uses_dynamic_guidance
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.nano_models import transformer_part
from cogtune.models.variants import NANO_VARIANTS
from tools.nano.common import best_device, machine, say

_BATCH = 16


def pipeline_of(given: argparse.Namespace, folder: Path, device: torch.device) -> tuple[DiffusionPipeline, Any]:
    """Return the pipeline, with the transformer of a checkpoint where one is given."""
    if given.transformer is not None:
        (given.parts / transformer_part(given.variant)).mkdir(exist_ok=True)
    write_nano(given.variant, given.parts, folder)
    spec_folder = folder
    more: dict[str, Any] = {}
    if given.transformer is not None:
        more["transformer"] = CogVideoXTransformer3DModel.from_pretrained(given.transformer, dtype=torch.float32)
        (folder / "transformer" / "config.json").write_text((given.transformer / "config.json").read_text())
    spec = read_spec(spec_folder)
    pipeline = pipeline_class(spec).from_pretrained(folder, dtype=torch.float32, **more)
    pipeline.scheduler = scheduler_for(spec, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device), spec


def sample(pipeline: Any, spec: Any, given: argparse.Namespace, prompts: list[str], images: Any, seed: int) -> Any:
    """Videos ``uint8 [B, F, H, W, 3]``, each from noise of its own."""
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    pictures = {} if images is None else {"image": images}
    frames = pipeline(
        prompt=prompts,
        num_frames=world.SIZE.num_frames,
        height=world.SIZE.height,
        width=world.SIZE.width,
        num_inference_steps=given.steps,
        guidance_scale=given.guidance,
        use_dynamic_cfg=uses_dynamic_guidance(pipeline.scheduler),
        generator=generators,
        max_sequence_length=spec.max_text_seq_length,
        output_type="np",
        **pictures,
    ).frames
    return (np.asarray(frames) * 255).round().astype(np.uint8)


def table(pairs: list[tuple[world.Subject, detector.Reading]]) -> dict[str, dict[str, int]]:
    """For each part, how often every ``asked -> read`` that is wrong came."""
    return {
        part: {f"{asked} -> {read}": n for (asked, read), n in sorted(counts.items()) if asked != read}
        for part in ("colour", "shape", "motion", "background")
        for counts in [detector.confusion(pairs, part)]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=NANO_VARIANTS)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, help="a checkpoint's transformer/ in place of the part")
    parser.add_argument("--out", type=Path, help="folder for the sheet and the figures [default: PARTS/scores]")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    given = parser.parse_args()
    device = best_device(given.device)
    asked = world.held_out_prompts()[: given.count]
    pairs, sheet, kept, drawn = [], [], [], []
    with tempfile.TemporaryDirectory() as own:
        pipeline, spec = pipeline_of(given, Path(own) / "model", device)
        for start in range(0, len(asked), _BATCH):
            subjects, prompts = zip(*asked[start : start + _BATCH], strict=True)
            images = None
            if spec.image_to_video:
                scenes = [world.scene_of(one, np.random.default_rng([given.seed, start])) for one in subjects]
                drawn = [world.draw(scene)[0] for scene in scenes]
                images = [Image.fromarray(frame) for frame in drawn]
            videos = sample(pipeline, spec, given, list(prompts), images, given.seed + start)
            for number, (subject, video) in enumerate(zip(subjects, videos, strict=True)):
                pairs.append((subject, detector.detect(video)))
                sheet.append(np.concatenate(video[::4], axis=1))
                if images is not None:
                    error = ((video[0].astype(float) - drawn[number]) ** 2).mean()
                    kept.append(10 * float(np.log10(255**2 / max(error, 1e-3))))
            say(f"{sum(reading.shows(subject) for subject, reading in pairs)} of {len(pairs)} show what was asked")
    shown = sum(reading.shows(subject) for subject, reading in pairs)
    figures: dict[str, Any] = {"shown": shown, "asked": len(pairs), "steps": given.steps, "guidance": given.guidance}
    for part in ("colour", "shape", "motion", "background"):
        figures[part] = sum(getattr(subject, part) == getattr(reading, part) for subject, reading in pairs)
    if kept:
        figures["first frame, dB"] = {"mean": round(float(np.mean(kept)), 2), "least": round(min(kept), 2)}
    figures |= {"wrong": table(pairs), "seed": given.seed, **machine(device)}
    out = given.out or given.parts / "scores"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{given.variant}.json").write_text(json.dumps(figures, indent=1) + "\n")
    half = (len(sheet) + 1) // 2
    columns = [np.concatenate(rows) for rows in (sheet[:half], sheet[half:] or sheet[:half])]
    height = min(map(len, columns))
    Image.fromarray(np.concatenate([column[:height] for column in columns], axis=1)).save(out / f"{given.variant}.png")
    say(f"{given.variant}: {shown} of {len(pairs)}; {figures}")


if __name__ == "__main__":
    main()
