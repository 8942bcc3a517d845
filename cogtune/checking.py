"""Looking at a dataset before anything is made of it: where it is, what is in it, what is wrong with it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from cogtune import caching, console
from cogtune.config import RunConfig
from cogtune.data.checks import Report, check_dataset
from cogtune.data.facts import Facts
from cogtune.data.findings import listed
from cogtune.data.images import HINT, transparency_warning
from cogtune.data.prompts import Watched, choose_prompts
from cogtune.data.quarantine import without_quarantined, write_quarantine
from cogtune.data.sources import Dataset, Reading, locate_dataset, read_dataset
from cogtune.errors import CogtuneError, UsageError
from cogtune.modeling.locate import locate
from cogtune.modeling.tokens import cut_short, token_counter
from cogtune.models import TINY, ModelSpec, published, published_spec, read_spec


def validate(
    config: RunConfig,
    *,
    full: bool = False,
    strict: bool = False,
    quarantine: Path | None = None,
    page: Path | None = None,
    page_clips: int | None = None,
) -> Report:
    """Look for everything that is wrong with a dataset; a published model need not be on this machine.

    Args:
        full: decode every frame, rather than one of each clip.
        quarantine: a file to list the samples in that have an error, with ``strict`` also those that have a warning.
        page: an HTML file to show the clips and the findings in.
        page_clips: how many clips it shows at most.

    Raises:
        CogtuneError: there is no dataset, or no such model, or the page cannot be written.
    """
    config = with_data_here(config)
    row = published(config.model)
    if row is None or Path(config.model).is_dir() or config.model.startswith(TINY):
        spec = read_spec(locate(config.model, weights=False))
    else:
        spec = published_spec(row)
    dataset, settings = _read(config), caching.frame_settings(config, spec)
    report = _checked(dataset, config, spec, full=full)
    if quarantine is not None:
        count = write_quarantine(quarantine, dataset, report.findings, strict=strict)
        console.note(f"{quarantine} names {count} sample{'' if count == 1 else 's'} to leave out")
    if page is not None:
        from cogtune.report.dataset import MOST_CLIPS, Checked, write_dataset_report

        most = MOST_CLIPS if page_clips is None else page_clips
        with console.progress("drawing clips", min(most, len(dataset.samples))) as progress:
            checked = Checked(dataset, settings, report, token_counter(config.model, config.id_token))
            write_dataset_report(page, checked, most_clips=most, progress=lambda: progress.advance())
    return report


def _checked(
    dataset: Dataset, config: RunConfig, spec: ModelSpec, *, full: bool = False, facts: Facts | None = None
) -> Report:
    settings = caching.frame_settings(config, spec)
    count = token_counter(config.model, config.id_token)
    with console.progress("checking", len(dataset.samples)) as progress:
        return check_dataset(dataset, settings, spec, full=full, count_tokens=count, facts=facts, tell=progress.advance)


def with_data_here(config: RunConfig, *, download: bool = True) -> RunConfig:
    """The same with a folder on this machine for its dataset, which may be one on the Hub."""
    found = {"data": locate_dataset(str(config.data), download=download)}
    if config.validation_data is not None:
        found["validation_data"] = locate_dataset(str(config.validation_data), download=download)
    return config.model_copy(update=found)


def _read(config: RunConfig) -> Dataset:
    return read_dataset(
        config.data,
        Reading(
            format=config.format,
            caption_column=config.caption_column,
            video_column=config.video_column,
            image_column=config.image_column,
            allow_outside=config.allow_outside,
            media=caching.store_of(config).root / "media",
        ),
    )


def checked_dataset(config: RunConfig, spec: ModelSpec) -> Dataset:
    """The dataset, when nothing in it stands in the way of training.

    Raises:
        CogtuneError: with every error found.
    """
    dataset = read_for_training(config)
    facts = caching.store_of(config).facts
    report = _checked(dataset, config, spec, facts=facts)
    facts.save()
    command = _validate_command(config, spec)
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if errors:
        raise CogtuneError(
            f"{config.data} cannot be trained on as it is",
            f"`{command}` explains each",
            details=[f"{finding.where}: {finding.message}" for finding in errors],
        )
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    if warnings:
        noun = "a warning" if warnings == 1 else f"{warnings} warnings"
        console.note(f"{noun} about the dataset; to see: {command}")
    return dataset


def read_for_training(config: RunConfig) -> Dataset:
    """The dataset without what its quarantine file leaves out; nothing in it is looked at."""
    dataset, file = _read(config), config.quarantine
    if file is None:
        return dataset
    remaining = without_quarantined(dataset, file)
    if remaining.left_out:
        noun = "sample is" if remaining.left_out == 1 else "samples are"
        console.note(f"{remaining.left_out} {noun} left out, as {file} says")
    if remaining.unknown:
        console.warn(f"{file} names what {dataset.root} does not have: {listed(remaining.unknown)}")
    return remaining.dataset


def watched_by(
    config: RunConfig, spec: ModelSpec, dataset: Dataset, read: Callable[[RunConfig], Dataset] | None = None
) -> Watched:
    """The validation samples and the prompts of a run, looked at as the training data is.

    Args:
        read: reads the validation data; by default so that it is checked, too.

    Raises:
        CogtuneError: with everything that is wrong with them.
    """
    prompts = choose_prompts(config, dataset.samples, with_image=spec.image_to_video)
    count = token_counter(config.model) if prompts else None
    for told in cut_short([prompt.text for prompt in prompts], spec.max_text_seq_length, count):
        console.warn(f"validation prompt {told}")
    if config.validation_images is not None:
        _check_images([prompt.image for prompt in prompts if prompt.image is not None])
    if config.validation_data is None:
        return Watched((), prompts)
    if config.validation_data == config.data:
        raise UsageError("the validation data is the training data", "keep some clips out, in a folder of their own")
    apart = config.model_copy(update={"data": config.validation_data, "quarantine": None})
    held_out = (read(apart) if read else checked_dataset(apart, spec)).samples
    most = min(config.validation_samples, len(held_out))
    return Watched(tuple(held_out[number * len(held_out) // most] for number in range(most)), prompts)


def _check_images(images: Sequence[Path]) -> None:
    """Look at the images that sample videos start from; of transparency it is warned.

    Raises:
        UsageError: some of them cannot be read.
    """
    problems = []
    for image in dict.fromkeys(images):
        try:
            if warning := transparency_warning(image):
                console.warn(warning)
        except CogtuneError as error:
            problems.append(f"validation_images: {error.message}")
    if problems:
        raise UsageError("the sample videos cannot be made as they are configured", HINT, details=problems)


def _validate_command(config: RunConfig, spec: ModelSpec) -> str:
    """The command that checks the dataset against what this run takes from it."""
    settings = caching.frame_settings(config, spec)
    words = ["cogtune", "dataset", "validate", str(config.data), "--model", config.model]
    words += ["--buckets", ",".join(config.buckets)] if config.buckets else ["--size", str(settings.size)]
    usual = RunConfig()
    optional = {
        "--fps": config.fps,
        "--sampling": config.sampling if config.sampling != usual.sampling else None,
        "--skip-start": config.skip_start or None,
        "--skip-end": config.skip_end or None,
        "--reshape": config.reshape if config.reshape != usual.reshape else None,
        "--seed": config.seed if settings.draws and config.seed != usual.seed else None,
        "--format": config.format,
        "--caption-column": config.caption_column,
        "--video-column": config.video_column,
        "--image-column": config.image_column,
    }
    words += [word for flag, value in optional.items() if value is not None for word in (flag, str(value))]
    return shlex.join([*words, "--allow-outside"] if config.allow_outside else words)
