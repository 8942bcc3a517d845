"""Reading of datasets: samples, each a clip with its caption, from a folder in any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cogtune.config.choices import DataFormat
from cogtune.data.findings import Finding, finding, listed
from cogtune.data.layouts.base import Layout, LayoutContent, Sample, Unpaired
from cogtune.data.layouts.datasets_library import DATASETS, takes_every_file
from cogtune.data.layouts.folder import Folder, LayoutOptions
from cogtune.data.layouts.lists import CAPTIONS, IMAGES, LISTS, VIDEOS
from cogtune.data.layouts.media import is_clip
from cogtune.data.layouts.nearest import in_place_of_folder, what_is_there
from cogtune.data.layouts.sidecar import SIDECAR
from cogtune.data.layouts.tables import TABLE
from cogtune.models.download import home, snapshot
from cogtune.system.errors import CogtuneError, counted

__all__ = [
    "CAPTIONS",
    "IMAGES",
    "LAYOUTS",
    "VIDEOS",
    "Dataset",
    "LayoutOptions",
    "Sample",
    "locate_dataset",
    "read_dataset",
    "takes_every_file",
]

LAYOUTS: tuple[Layout, ...] = (LISTS, TABLE, DATASETS, SIDECAR)
"""All layouts; the first that matches a folder is used, unless the user names one."""


@dataclass(frozen=True)
class Dataset:
    """The samples of a folder, and findings about everything else.

    ``samples`` may name missing files (each has a finding), but none outside ``root`` unless allowed. ``layout``
    describes how the folder was read. ``unpaired`` has listed clips and captions that make no sample.
    """

    root: Path
    layout: str
    samples: tuple[Sample, ...]
    findings: tuple[Finding, ...]
    unpaired: Unpaired = field(default_factory=Unpaired)


_AS_FOUND = LayoutOptions()


def read_dataset(
    root: Path, reading: LayoutOptions = _AS_FOUND, tell: Callable[[int, int], None] = lambda _done, _total: None
) -> Dataset:
    """Return the dataset in the folder ``root``, in any of :data:`LAYOUTS`.

    No clip is opened. All problems with lists, rows, paths and missing files become findings.

    Args:
        tell: called now and then with the number of entries done, and the total.

    Raises:
        CogtuneError: the folder does not exist, matches no layout or not the requested one, has several tables, or
            its table lacks the columns.
    """
    if not root.is_dir():
        state = "is a file, not a folder" if root.is_file() else "does not exist"
        raise CogtuneError(
            f"the dataset folder {root} {state}", in_place_of_folder(root) or f"a dataset is {_expected()}"
        )
    folder = Folder(root, reading, tell)
    layout, others = _layout_of(folder)
    if not layout.has_columns:
        _refuse_columns(root, layout, reading)
    content = layout.read(folder)
    samples, findings = content.samples, [*content.findings]
    if not samples and not findings:
        message = f"{root} has no samples"
        findings.append(finding("no-samples", str(root), message, f"a dataset is {layout.expects}"))
    for other, other_format in others:
        message = f"read as {content.announced}; it could also be read as {other.name}"
        findings.append(finding("other-layout", str(root), message, f"use --format {other_format} for that"))
    findings += [*folder.notes(), *_not_named(folder, layout, content)]
    return Dataset(root, content.announced, tuple(samples), tuple(findings), content.unpaired)


def _not_named(folder: Folder, layout: Layout, content: LayoutContent) -> list[Finding]:
    """Return a note of clips that the lists or table do not name, if everything that they name could be read."""
    if not layout.names_clips or any(found.severity == "error" for found in content.findings):
        return []
    named = {sample.video for sample in content.samples}
    rest = [file for file in folder.files if is_clip(file) and folder.root / file not in named]
    if not rest:
        return []
    message = f"{counted(len(rest), 'clip')} in the folder not named in {content.announced}: {listed(rest, 3)}"
    return [finding("left-out", str(folder.root), message)]


def _layout_of(folder: Folder) -> tuple[Layout, list[tuple[Layout, DataFormat]]]:
    """Return the layout of a folder, and others that it also matches if the user named none.

    Raises:
        CogtuneError: it matches none.
    """
    root, wanted = folder.root, folder.reading.format
    if wanted is not None:
        return next(layout for layout in LAYOUTS if wanted in layout.formats), []
    detected = [(layout, found) for layout in LAYOUTS if (found := layout.detect(folder)) is not None]
    detected = detected or [(layout, found) for layout in LAYOUTS if (found := layout.almost(folder)) is not None][:1]
    if detected:
        return detected[0][0], detected[1:]
    clips = [path for path in folder.files if is_clip(path)]
    if clips:
        problem = f"{root} contains {counted(len(clips), 'clip')} ({listed(clips, 3)}), but no captions"
    else:
        problem = f"{root} is not a dataset: it has no lists, table or captioned clips"
    nearest = what_is_there(folder)
    raise CogtuneError(f"{problem}; {nearest}" if nearest else problem, f"a dataset is {_expected()}")


def _refuse_columns(root: Path, layout: Layout, reading: LayoutOptions) -> None:
    given = [name for name in ("caption_column", "video_column", "image_column") if getattr(reading, name) is not None]
    if given:
        flags = listed([f"--{name.replace('_', '-')}" for name in given])
        raise CogtuneError(
            f"{flags} requires a table, but {root} is read as {layout.name}",
            "remove the flag, or choose a table with --format",
        )


def _expected() -> str:
    return "; or ".join(f"{layout.expects} ({layout.name})" for layout in LAYOUTS)


# ------------------------------------------------------------------------------------------- from the Hub


def is_on_hub(reference: str) -> bool:
    """Return whether a reference can only mean a dataset on the Hub, ``user/name``."""
    owner, _, name = reference.partition("/")
    is_name = bool(owner) and bool(name) and "/" not in name and owner[0] not in ".~"
    here = Path(reference).expanduser().exists() or Path(owner).exists()  # data/clip for data/clips is no such name
    return is_name and not here


def locate_dataset(reference: str, *, download: bool = True) -> Path:
    """Return the local folder of a dataset: an existing folder, or that of a downloaded dataset from the Hub.

    A download goes to ``$COGTUNE_HOME/datasets`` (``~/.cache/cogtune``) as plain files, not to the Hub's own cache:
    there every clip is a link that leads out of its folder. Existing files are not downloaded again.

    Args:
        reference: a folder, or ``user/name`` for a dataset on the Hub.
        download: False to fetch nothing.

    Raises:
        CogtuneError: it is missing and may not be downloaded, the Hub has no such dataset, or the download failed.
    """
    if not is_on_hub(reference):
        return Path(reference).expanduser()
    target = home() / "datasets" / reference.replace("/", "--")
    if download:
        try:
            snapshot(reference, "dataset", folder=target, otherwise="check the path or the network")
        except CogtuneError as error:
            raise CogtuneError(f"no such folder: {reference}; {error.message}", error.hint) from error
    elif not target.is_dir():
        raise CogtuneError(
            f"the dataset {reference} is not on this machine, and this command downloads nothing",
            f"run `cogtune dataset validate {reference}` to download it",
        )
    return target
