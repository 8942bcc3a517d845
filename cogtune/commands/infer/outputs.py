"""The files of sampled videos: their names, their metadata, and which of them already exist."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtune import __version__
from cogtune.commands.infer.request import InferRequest, Row, names_file
from cogtune.commands.infer.sampling_config import SamplingConfig
from cogtune.data.video.generated import facts_of
from cogtune.models.checkpoint_configs import fingerprint
from cogtune.system.digests import digest, digest_file
from cogtune.system.errors import UsageError

_NAMES = frozenset({"version", "model", "file"})
"""Metadata that does not decide how a video looks: digests do."""


@dataclass(frozen=True, eq=False)
class PlannedVideo:
    """One video: what it is made of, where it goes, and whether it already exists."""

    row: Row
    seed: int
    scale: float
    path: Path
    facts: Mapping[str, Any]
    """The file's metadata."""
    done: bool


def plan_videos(recipe: SamplingConfig, request: InferRequest) -> list[PlannedVideo]:
    """List all videos of a request, prompt by prompt.

    Raises:
        UsageError: ``--output`` names a file that exists and is another video.
        CogtuneError: a file cannot be written.
    """
    shared, digests = _shared_facts(recipe), _Digests()
    claimed: set[Path] = set()
    videos = []
    for row in recipe.rows:
        for seed in recipe.seeds:
            for scale in recipe.scales:
                facts = {**_facts(recipe, row, seed, scale, digests), **shared}
                path, done = _place(request, _name(recipe, row, seed, scale), facts, claimed)
                claimed.add(path)
                videos.append(PlannedVideo(row, seed, scale, path, facts, done and not request.force))
    return videos


def free_name(path: Path) -> Path:
    """Return ``path``, or the first of ``NAME-2``, ``NAME-3`` and so on that is not taken."""
    return next(found for found in _names(path) if not os.path.lexists(found))


def grid_path(videos: Sequence[PlannedVideo]) -> Path:
    """Return the file of a grid, named after a digest of what is in it."""
    first = videos[0].path
    return first.with_name(f"grid-{digest([_deciding(video.facts) for video in videos])[:8]}{first.suffix}")


def _names(path: Path) -> Iterator[Path]:
    yield path
    number = 1
    while True:
        number += 1
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _name(recipe: SamplingConfig, row: Row, seed: int, scale: float) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", row.prompt.lower()).strip("-")[:40].strip("-")
    parts = [words or "video"]
    for kind in ("image", "video"):
        files = {getattr(other, kind) for other in recipe.rows}
        if len(files) > 1:
            parts.append(re.sub(r"[^\w]+", "-", getattr(row, kind).stem)[:40])
    parts.append(str(seed))
    if len(recipe.scales) > 1:
        parts.append(f"x{scale:g}")
    return "-".join(parts)


def _place(request: InferRequest, name: str, facts: Mapping[str, Any], claimed: set[Path]) -> tuple[Path, bool]:
    """Return where a video goes, and whether it already exists."""
    output = request.output
    if output is not None and names_file(output):
        if not os.path.lexists(output) or request.force:
            return output, False
        if not _is(output, facts):
            raise UsageError(f"{output} already exists", "choose another --output, or use --force to overwrite it")
        return output, True
    folder = output or Path()
    names = _names(folder / f"{name}.{request.format or 'mp4'}")
    path = next(path for path in names if path not in claimed and (not os.path.lexists(path) or _is(path, facts)))
    return path, os.path.lexists(path)


def _is(path: Path, facts: Mapping[str, Any]) -> bool:
    """Return whether a file is the video of these facts."""
    there = facts_of(path)
    return there is not None and _deciding(there) == _deciding(facts)


def _deciding(facts: Any) -> Any:
    """Return what of a video's facts decides how it looks."""
    if isinstance(facts, Mapping):
        return {key: _deciding(value) for key, value in facts.items() if key not in _NAMES and key != "comment"}
    return [_deciding(value) for value in facts] if isinstance(facts, list) else facts


def weights_of(facts: Mapping[str, Any]) -> str:
    """Return a digest of the weights, their strengths and the number format that a video was made with."""
    return digest(_deciding({key: facts.get(key) for key in ("weights", "loras", *_FORMATS)}))


class _Digests(dict[Path, str]):
    """Digests of files, each made once."""

    def __missing__(self, path: Path) -> str:
        self[path] = digest_file(path)
        return self[path]


def _shared_facts(recipe: SamplingConfig) -> dict[str, Any]:
    weights = recipe.transformer or recipe.base / "transformer"
    return {
        "version": __version__,
        "model": Path(recipe.name).name if Path(recipe.name).exists() else recipe.name,
        "weights": fingerprint(weights.parent, weights.name),
        "size": str(recipe.size),
        "fps": recipe.fps,
        **_formats(recipe),
        "scheduler": recipe.scheduler,
        "steps": recipe.steps,
        "guidance": recipe.guidance,
    }


_FORMATS = ("precision", "base_precision", "text_encoder_precision")


def _formats(recipe: SamplingConfig) -> dict[str, Any]:
    return {name: value for name in _FORMATS if (value := getattr(recipe, name)) is not None}


def _facts(recipe: SamplingConfig, row: Row, seed: int, scale: float, digests: _Digests) -> dict[str, Any]:
    facts: dict[str, Any] = {"prompt": row.prompt, "negative_prompt": recipe.negative_prompt, "seed": seed}
    if recipe.loras:
        facts["loras"] = [
            {
                "file": lora.path.name,
                "digest": digests[lora.path],
                "weight": weight * scale,
                "alpha": lora.alphas[0],
            }
            for lora, weight in recipe.loras
        ]
    if row.image is not None:
        facts["image"] = {"file": row.image.name, "digest": digests[row.image]}
    if row.video is not None:
        facts["video"] = {"file": row.video.name, "digest": digests[row.video], "strength": recipe.strength}
    return facts
