"""What the ``datasets`` library reads: its saved folders, and those that it knows how to load, clips inside or beside.

Clips and images that are stored as bytes are written out once, each under the digest of its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogtune.config import DataFormat
from cogtune.data.findings import Finding, listed
from cogtune.data.layouts import Content, Entry, Layout, Reading, to_samples
from cogtune.data.layouts_rows import USUAL_NAMES, choose_columns, entry_of
from cogtune.errors import CogtuneError, said_by
from cogtune.files import write_atomic

SAVED = ("state.json", "dataset_dict.json")
"""What ``save_to_disk`` leaves: of one split, of several."""

_USUAL_NAMES = {
    "video": (*USUAL_NAMES["video"], "mp4", "mov", "mkv", "webm", "avi"),
    "caption": (*USUAL_NAMES["caption"], "txt"),
    "image": (*USUAL_NAMES["image"], "png", "jpg", "jpeg"),
}
"""With those of WebDataset, whose columns are the files' suffixes."""

_KEY = "__key__"
"""WebDataset's column of names."""


def _read(root: Path, reading: Reading) -> Content:
    media = reading.media or root / ".cogtune" / "media"
    name, table = _load(root, media)
    columns = choose_columns(name, table.column_names, reading, _USUAL_NAMES)
    used = [column for column in (columns.video, columns.caption, columns.image) if column is not None]
    findings: list[Finding] = []
    key = [_KEY] if _KEY in table.column_names and _KEY not in used else []
    roles = {"video": columns.video, **({"image": columns.image} if columns.image is not None else {})}

    def entries() -> Iterator[Entry]:
        for number, row in enumerate(_rows(root, table.select_columns([*used, *key])), start=1):
            files: dict[str, Path | None] = {}
            for role, column in roles.items():
                unnamed = f"{row[_KEY] if key else f'{name}/{number:06d}'}{'.mp4' if role == 'video' else '.png'}"
                row[column], files[role] = _file_of(row[column], unnamed, root, media)
            entry = entry_of(name, (number, row), columns, findings)
            if entry is not None:
                image = entry.image and replace(entry.image, file=files["image"])
                yield replace(entry, video=replace(entry.video, file=files["video"]), image=image)

    samples = to_samples(root, entries(), reading, findings)
    return Content(f"the {name} split that the datasets library reads: {', '.join(used)}", samples, findings)


def _load(root: Path, media: Path) -> tuple[str, Any]:
    """The name of the split to read and its ``datasets.Dataset``, whose clips and images are not decoded.

    Raises:
        CogtuneError: the library is not installed or cannot read the folder, or no split is the obvious one.
    """
    try:
        import datasets
    except ImportError as error:
        raise CogtuneError(
            f"reading {root} takes the datasets library, which is not installed", "pip install 'cogtune[datasets]'"
        ) from error
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if any((root / name).is_file() for name in SAVED):
            splits = datasets.load_from_disk(str(root))
        else:
            splits = datasets.load_dataset(str(root), cache_dir=str(media.parent / "datasets"))
        if isinstance(splits, datasets.Dataset):
            splits = {str(splits.split or "train"): splits}
        name = "train" if "train" in splits else next(iter(splits))
        if len(splits) > 1 and name != "train":
            raise CogtuneError(
                f"{root} has the splits {listed(list(splits))}, and none called train",
                "save the one you mean by itself",
            )
        table = splits[name]
        for column, feature in table.features.items():
            if isinstance(feature, (datasets.Video, datasets.Image)):
                table = table.cast_column(column, type(feature)(decode=False))
    except CogtuneError:
        raise
    except Exception as error:  # its builders raise whatever they like
        raise CogtuneError(
            f"the datasets library cannot read {root}: {said_by(error)}",
            "see that datasets.load_dataset reads that folder",
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    return name, table


def _rows(root: Path, table: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from table
    except (OSError, ValueError, RuntimeError) as error:
        raise CogtuneError(f"cannot read {root}: {str(error).splitlines()[0]}", "make or download it again") from error


def _file_of(value: Any, unnamed: str, root: Path, media: Path) -> tuple[Any, Path | None]:
    """The path that a cell holds, and where its bytes are now, if it holds any; another value as it is."""
    path = value
    if isinstance(value, Mapping) and "bytes" in value:
        path, value = value.get("path"), value["bytes"]
    if isinstance(value, bytes):
        name = Path(path).name if isinstance(path, str) and path else unnamed
        return name, _written(value, media, Path(name).suffix or Path(unnamed).suffix)
    if isinstance(path, str) and Path(path).is_relative_to(root.absolute()):
        return Path(path).relative_to(root.absolute()).as_posix(), None
    return path, None


def _written(data: bytes, media: Path, suffix: str) -> Path:
    """The file that holds ``data``; written if it is not there."""
    name = hashlib.blake2b(data, digest_size=16).hexdigest()
    path = media / name[:2] / f"{name}{suffix.lower()}"
    if not path.is_file() or path.stat().st_size != len(data):
        write_atomic(path, lambda aside: aside.write_bytes(data))
    return path


def _detect(root: Path, _reading: Reading) -> DataFormat | None:
    return "datasets" if any((root / name).is_file() for name in SAVED) else None


DATASETS = Layout(
    ("datasets",),
    "a folder of the datasets library",
    "what the datasets library saved or can load",
    _detect,
    _read,
)
