"""``cogtune compare`` from start to finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cogtune import __version__
from cogtune.commands.compare.candidates import Candidate, find_candidates, run_of
from cogtune.commands.compare.grid import MOST_COLUMNS, MOST_ROWS, write_grid
from cogtune.commands.compare.losses import Losses
from cogtune.commands.compare.measuring import Entry, measured_rows
from cogtune.commands.compare.request import CompareRequest
from cogtune.commands.compare.scenes import Asked, RunData, read_run_data, scenes_of
from cogtune.commands.infer.filling import Model, model_of
from cogtune.commands.infer.making import Batch, plan_batch, sample_batches
from cogtune.commands.infer.outputs import weights_of
from cogtune.commands.infer.remarks import Remarks
from cogtune.commands.infer.request import InferRequest, size_asked
from cogtune.commands.infer.sampling_config import SamplingConfig
from cogtune.models.geometry import Size
from cogtune.quality.clip_similarity import ClipModel
from cogtune.quality.looks import ranges_of
from cogtune.quality.references import MeasuredClips, choose_clips, measure_clips
from cogtune.quality.signs import Settings, with_signs
from cogtune.quality.verdict import choose
from cogtune.report.comparison import write_comparison_page
from cogtune.run.comparison import NAME, PAGE, Comparison, Scene, read_comparison, write_comparison
from cogtune.run.folder import RunFolder
from cogtune.system import console
from cogtune.system.digests import digest
from cogtune.system.errors import CogtuneError, UsageError

MOST_CLIPS = 100
"""Training clips that videos are compared with, spread evenly over the data."""


def compare(request: CompareRequest) -> tuple[Comparison, Path]:
    """Sample, measure and judge; return what was found, and the page that shows it.

    What an earlier call made is not made again, so the command can be interrupted and repeated.

    Raises:
        UsageError: something that is asked for does not fit.
        CogtuneError: a model cannot be read, or a file not be written.
    """
    candidates = find_candidates(request.targets)
    run = run_of(candidates)
    output = _output_of(request, run)
    clip_model = None if request.clip is None else ClipModel(request.clip)
    model = _model_of(request, candidates)
    data = read_run_data(run, request.data, model.spec)
    size, asked = _asked(request, model, data, output)
    batches = _batches(request, candidates, model, asked, size, output)
    losses = Losses(run, output)
    paths = sample_batches([batch for _, batch in batches], losses)
    entries = [Entry(one, batch, tuple(places)) for (one, batch), places in zip(batches, paths, strict=True)]
    recipe = entries[0].batch.recipe
    scenes = [one.scene(seed) for one in asked for seed in recipe.seeds]
    clips = _clips(data, recipe)
    base, *rows = measured_rows(entries, scenes, clips, losses, clip_model, output)
    ranges = ranges_of(clips.looks)
    rows = with_signs(rows, base, ranges, _settings(data))
    chosen, verdict = choose(rows, base, ranges)
    found = Comparison(
        version=__version__,
        model=model.name,
        scenes=scenes,
        base=base,
        rows=rows,
        clips=ranges,
        clip_count=len(clips.ids),
        grid=_grid(scenes, entries, [row.title for row in (base, *rows)], output).name,
        chosen=chosen,
        verdict=verdict,
    )
    write_comparison(output, found)
    return found, write_comparison_page(output, found)


def _output_of(request: CompareRequest, run: Path | None) -> Path:
    """Return the folder for everything.

    Raises:
        UsageError: it has files of these names that are not a comparison.
    """
    output = request.output or (RunFolder(run).comparison if run is not None else Path("compare"))
    if output.is_file():
        raise UsageError(f"{output} is a file, not a folder", "choose another --output")
    try:
        earlier = read_comparison(output)
    except CogtuneError as error:
        raise UsageError(error.message, f"delete {output / NAME}, or choose another --output") from error
    if earlier is None and (output / PAGE).exists():
        raise UsageError(f"{output / PAGE} already exists", "choose another --output")
    return output


def _model_of(request: CompareRequest, candidates: Sequence[Candidate]) -> Model:
    """Return the base model, and what the first weights say of their run."""
    if not candidates:
        if request.model is None:
            raise UsageError("there is nothing to compare", "pass a run, a checkpoint or a LoRA file")
        return model_of(InferRequest(model=request.model))
    first = candidates[0]
    if first.is_lora:
        return model_of(InferRequest(loras=(first.reference,), model=request.model))
    full = model_of(InferRequest(model=first.reference))
    if full.transformer is None and request.model is None:
        raise UsageError(
            f"{first.reference} does not say which model it was trained from", "pass the base model as --model"
        )
    return full if request.model is None else replace(full, name=request.model, folder=request.model)


def _asked(request: CompareRequest, model: Model, data: RunData, output: Path) -> tuple[Size, list[Asked]]:
    """Return the size of the videos, and what they show."""
    default = Size.parse(model.facts["size"]) if model.facts.get("size") else model.spec.native
    size = size_asked(InferRequest(size=request.size, frames=request.frames), default)
    asked = scenes_of(request, data, dict(model.facts), model.spec, size, output)
    if not asked:
        raise UsageError("there is no prompt to compare with", "pass --prompt, and --image for an image-to-video model")
    return size, asked


def _batches(
    request: CompareRequest,
    candidates: Sequence[Candidate],
    model: Model,
    asked: Sequence[Asked],
    size: Size,
    output: Path,
) -> list[tuple[Candidate | None, Batch]]:
    """Return the videos of the base, and of each candidate at each strength, all with the same settings."""
    facts, spec = model.facts, model.spec
    shared = InferRequest(
        model=model.folder,
        prompts=tuple(one.prompt for one in asked),
        images=tuple(one.image for one in asked if one.image is not None),
        id_token="",
        size=str(size),
        fps=float(request.fps or facts.get("fps") or spec.variant.fps),
        precision=request.precision or facts.get("precision") or spec.variant.trained_in,
        num_videos=request.num_videos,
        seed=request.seed,
        steps=request.steps,
        guidance=request.guidance,
        scheduler=request.scheduler,
        vram=request.vram,
        output=output / "videos" / "base",
    )
    requests: list[tuple[Candidate | None, InferRequest]] = [(None, shared)]
    for one in candidates:
        place = output / "videos" / one.label
        if not one.is_lora:
            requests.append((one, replace(shared, model=one.reference, output=place)))
            continue
        for scale in dict.fromkeys(request.lora_scales or (1.0,)):
            here = place if scale == 1 else place.with_name(f"{place.name}-x{scale:g}")
            requests.append((one, replace(shared, loras=(one.reference,), lora_scales=(scale,), output=here)))
    remarks = Remarks()
    return [(one, plan_batch(asked_for, remarks)) for one, asked_for in requests]


def _clips(data: RunData, recipe: SamplingConfig) -> MeasuredClips:
    """Return the training clips, read at the size of the videos."""
    if data.settings is None:
        return MeasuredClips()
    settings = replace(data.settings, size=recipe.size, fps=recipe.fps, buckets=())
    chosen = choose_clips(data.samples, settings, MOST_CLIPS, console.warn)
    if len(data.samples) > MOST_CLIPS:
        console.note(f"comparing with {len(chosen)} of the {len(data.samples):,} training clips")
    with console.progress("reading training clips", len(chosen)) as progress:
        return measure_clips(chosen, console.warn, progress.advance)


def _settings(data: RunData) -> Settings:
    if data.config is None:
        return Settings()
    steps = None if data.config.epochs else data.config.steps
    return Settings.of(data.config, steps=steps, clips=len(data.samples) or None)


def _grid(scenes: Sequence[Scene], entries: Sequence[Entry], titles: Sequence[str], output: Path) -> Path:
    """Write the grid of all videos, unless the same one is there; its name is a digest of what is in it."""
    key = digest([[weights_of(video.facts) for video in one.batch.videos] + [one.scale, *titles] for one in entries])
    names = [[path.name for path in one.paths] for one in entries]
    path = output / f"grid-{digest([key, names])[:8]}.mp4"
    if not path.exists():
        rows = [
            (f"{scene.prompt} (seed {scene.seed})", [entry.paths[number] for entry in entries])
            for number, scene in enumerate(scenes)
        ]
        facts = {"title": "cogtune compare", "description": " | ".join(titles)}
        write_grid(path, rows, titles, entries[0].batch.recipe.fps, facts)
    if len(scenes) > MOST_ROWS or len(titles) > MOST_COLUMNS:
        console.note(f"the grid shows the first {MOST_ROWS} prompts and {MOST_COLUMNS} columns; the page shows all")
    return path
