"""Finding, reading and checking a dataset before it is used."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from cogtune.config.run_config import RunConfig
from cogtune.data.cache.facts import Facts
from cogtune.data.findings import listed
from cogtune.data.prompts import ValidationSet, choose_prompts
from cogtune.data.sources import Dataset, LayoutOptions, locate_dataset, read_dataset, takes_every_file
from cogtune.data.validation.checks import ValidationReport, check_dataset
from cogtune.data.validation.quarantine import without_quarantined, write_quarantine
from cogtune.data.video.images import HINT, image_warnings
from cogtune.encoding import jobs
from cogtune.models.checkpoint_configs import ModelSpec
from cogtune.models.locate import spec_of
from cogtune.models.tokens import cut_short, token_counter
from cogtune.system import console, names
from cogtune.system.errors import CogtuneError, UsageError, counted

MOST_TOLD = 100
"""The number of errors shown before a run; a dataset may have as many as it has samples."""

_ALWAYS_TOLD = frozenset({"left-out", "own-files", "read-as"})
"""Notes about which files are read as data, shown before a run as well."""


def validate(
    config: RunConfig,
    *,
    full: bool = False,
    strict: bool = False,
    quarantine: Path | None = None,
    page: Path | None = None,
    page_clips: int | None = None,
) -> ValidationReport:
    """Check a dataset and report all problems; a published model need not be on this machine.

    Args:
        full: decode every frame instead of one frame of each clip.
        quarantine: file to write the samples to that have an error, or with ``strict`` a warning.
        page: HTML file to write clips and findings to.
        page_clips: maximum number of clips on the page.

    Raises:
        CogtuneError: there is no dataset, or no such model, or the page cannot be written.
    """
    config = with_data_here(config)
    spec = spec_of(config.model)
    dataset, settings = _read(config), jobs.frame_settings(config, spec)
    report = _checked(dataset, config, spec, full=full)
    if quarantine is not None:
        count = write_quarantine(quarantine, dataset, report.findings, strict=strict)
        console.note(f"wrote {counted(count, 'sample')} to leave out to {quarantine}")
    if page is not None:
        from cogtune.report.dataset import MOST_CLIPS, CheckedDataset, write_dataset_report

        most = MOST_CLIPS if page_clips is None else page_clips
        with console.progress("drawing clips", min(most, len(dataset.samples))) as progress:
            checked = CheckedDataset(dataset, settings, report, token_counter(config.model, config.id_token))
            write_dataset_report(page, checked, most_clips=most, progress=lambda: progress.advance())
    return report


def _checked(
    dataset: Dataset, config: RunConfig, spec: ModelSpec, *, full: bool = False, facts: Facts | None = None
) -> ValidationReport:
    settings = jobs.frame_settings(config, spec)
    count = token_counter(config.model, config.id_token)
    count_listed = len(dataset.samples) + len(dataset.unpaired.clips)
    with console.progress("checking", count_listed) as progress:
        return check_dataset(dataset, settings, spec, full=full, count_tokens=count, facts=facts, tell=progress.advance)


def with_data_here(config: RunConfig, *, download: bool = True) -> RunConfig:
    """Return the configuration with its dataset as a local folder, downloaded from the Hub if need be."""
    found = {"data": locate_dataset(str(config.data), download=download)}
    if config.validation_data is not None:
        found["validation_data"] = locate_dataset(str(config.validation_data), download=download)
    return config.model_copy(update=found)


def _read(config: RunConfig) -> Dataset:
    reading = LayoutOptions(
        format=config.format,
        caption_column=config.caption_column,
        video_column=config.video_column,
        image_column=config.image_column,
        allow_outside=config.allow_outside,
        media=jobs.store_of(config).root / names.MEDIA,
    )
    with console.progress("reading", 0) as progress:
        return read_dataset(config.data, reading, progress.move_to)


def checked_dataset(config: RunConfig, spec: ModelSpec) -> Dataset:
    """Read the dataset and reject it if it cannot be trained on.

    Raises:
        CogtuneError: with every error found.
    """
    dataset = read_for_training(config)
    facts = jobs.store_of(config).facts
    report = _checked(dataset, config, spec, facts=facts)
    facts.save()
    command = _validate_command(config, spec)
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if errors:
        raise CogtuneError(
            f"{config.data} has errors and cannot be used for training",
            f"run `{command}` for details",
            details=[f"{finding.where}: {finding.message}" for finding in errors[:MOST_TOLD]]
            + ([f"{len(errors) - MOST_TOLD:,} more"] if len(errors) > MOST_TOLD else []),
        )
    for found in report.findings:
        if found.code in _ALWAYS_TOLD:
            console.note(f"{found.where}: {found.message}")
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    if warnings:
        console.note(f"{counted(warnings, 'warning')} about the dataset; for details, run: {command}")
    return dataset


def check_output(config: RunConfig) -> None:
    """Reject an output folder inside a dataset whose every file is read.

    In every other layout a run's own files are known as such, wherever they are.

    Raises:
        UsageError: the datasets library would read the run's sample videos as data.
    """
    inside = config.output.resolve().is_relative_to(config.data.resolve())
    if inside and config.format == "datasets" and takes_every_file(config.data):
        raise UsageError(
            f"--output {config.output} is inside the dataset, and the datasets library would read its videos as data",
            "choose an --output outside the dataset",
        )


def read_for_training(config: RunConfig) -> Dataset:
    """Read the dataset without the samples in its quarantine file; nothing in it is checked."""
    dataset, file = _read(config), config.quarantine
    if file is None:
        return dataset
    remaining = without_quarantined(dataset, file)
    if remaining.left_out:
        verb = "is" if remaining.left_out == 1 else "are"
        console.note(f"{counted(remaining.left_out, 'sample')} {verb} left out because of {file}")
    if remaining.unknown:
        console.warn(f"{file} lists samples that are not in {dataset.root}: {listed(remaining.unknown)}")
    return remaining.dataset


def validation_set(
    config: RunConfig, spec: ModelSpec, dataset: Dataset, read: Callable[[RunConfig], Dataset] | None = None
) -> ValidationSet:
    """Read a run's validation samples and prompts, checked like the training data.

    Args:
        read: reads the validation data; by default it is checked as well.

    Raises:
        CogtuneError: with all of their errors.
    """
    prompts = choose_prompts(config, dataset.samples, with_image=spec.image_to_video)
    count = token_counter(config.model) if prompts else None
    for told in cut_short([prompt.text for prompt in prompts], spec.max_text_seq_length, count):
        console.warn(f"validation prompt {told}")
    if config.validation_images is not None:
        _check_images([prompt.image for prompt in prompts if prompt.image is not None])
    if config.validation_data is None:
        return ValidationSet((), prompts)
    if config.validation_data == config.data:
        raise UsageError(
            "--validation-data is the training data", "keep some clips out of training, in a separate folder"
        )
    apart = config.model_copy(update={"data": config.validation_data, "quarantine": None})
    held_out = (read(apart) if read else checked_dataset(apart, spec)).samples
    most = min(config.validation_samples, len(held_out))
    return ValidationSet(tuple(held_out[number * len(held_out) // most] for number in range(most)), prompts)


def _check_images(images: Sequence[Path]) -> None:
    """Check the images that sample videos start from, and warn of what is not used of them.

    Raises:
        UsageError: some of them cannot be read.
    """
    problems = []
    for image in dict.fromkeys(images):
        try:
            for told in image_warnings(image):
                console.warn(told)
        except CogtuneError as error:
            problems.append(f"validation_images: {error.message}")
    if problems:
        raise UsageError("cannot make the sample videos", HINT, details=problems)


def _validate_command(config: RunConfig, spec: ModelSpec) -> str:
    """Return the command that checks the dataset with this run's settings."""
    settings = jobs.frame_settings(config, spec)
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
