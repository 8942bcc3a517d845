"""The layout of the ``datasets`` library: folders that it saved or can load, with clips inside or as files.

Clips and images that are stored as bytes are written to files once, named by the digest of their bytes.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from cogtune.config.choices import DataFormat
from cogtune.data.findings import Finding, finding, listed
from cogtune.data.layouts.base import DatasetEntry, Layout, LayoutContent, shortened, to_samples
from cogtune.data.layouts.folder import Folder
from cogtune.data.layouts.rows import USUAL_NAMES, choose_columns, entry_of
from cogtune.system import names
from cogtune.system.errors import CogtuneError, said_by
from cogtune.system.files import os_errors_explained, write_atomic
from cogtune.system.json_files import read_json

SAVED = ("state.json", "dataset_dict.json")
"""The files of ``save_to_disk``, for one split and for several."""

CARD, OVERRIDE = "README.md", ".huggingface.yaml"
"""The files that declare which files are data; the second overrides the first."""

_USUAL_NAMES = {
    "video": (*USUAL_NAMES["video"], "mp4", "mov", "mkv", "webm", "avi"),
    "caption": (*USUAL_NAMES["caption"], "txt"),
    "image": (*USUAL_NAMES["image"], "png", "jpg", "jpeg"),
}
"""Including those of WebDataset, whose columns are the files' suffixes."""

_COPY = "copy the file there, or use --allow-outside"

_KEY = "__key__"
"""WebDataset's column of names."""


def _read(folder: Folder) -> LayoutContent:
    root, reading = folder.root, folder.reading
    media = reading.media or root / ".cogtune" / names.MEDIA
    if problems := _reaches_out(folder):
        return LayoutContent(DATASETS.name, [], problems)
    name, table = _load(folder, media)
    columns = choose_columns(name, table.column_names, reading, _USUAL_NAMES)
    used = [column for column in (columns.video, columns.caption, columns.image) if column is not None]
    findings: list[Finding] = []
    key = [_KEY] if _KEY in table.column_names and _KEY not in used else []
    roles = {"video": columns.video, **({"image": columns.image} if columns.image is not None else {})}
    entries: list[DatasetEntry] = []
    for number, row in enumerate(_rows(root, table.select_columns([*used, *key])), start=1):
        files: dict[str, Path | None] = {}
        for role, column in roles.items():
            unnamed = f"{row[_KEY] if key else f'{name}/{number:06d}'}{'.mp4' if role == 'video' else '.png'}"
            row[column], files[role] = _file_of(row[column], unnamed, root, media)
        entry = entry_of(name, (number, row), columns, findings)
        if entry is not None:
            image = entry.image and replace(entry.image, file=files["image"])
            entries.append(replace(entry, video=replace(entry.video, file=files["video"]), image=image))
    samples = to_samples(folder, entries, findings)
    return LayoutContent(f"the {name} split that the datasets library reads: {', '.join(used)}", samples, findings)


# ------------------------------------------------------------------------------------------ what it would open


def takes_every_file(root: Path) -> bool:
    """Return whether the library reads all clips in a folder as data, as it does unless something was saved there."""
    return not any((root / name).is_file() for name in SAVED)


def _is_saved(folder: Folder) -> bool:
    return any(name in folder.top for name in SAVED)


def _reaches_out(folder: Folder) -> list[Finding]:
    """Return what the library would open outside the folder: links, and files that its descriptions name.

    Raises:
        CogtuneError: a description cannot be read, or the library would read cogtune's own files.
    """
    if not _is_saved(folder):
        _refuse_own_files(folder)
    if folder.reading.allow_outside:
        return []
    files = [*map(str, folder.files), OVERRIDE]
    problems = [problem for file in files if (problem := folder.outside(file, file)) is not None]
    problems += [
        finding("outside-folder", sub, f"{sub} is a link that leads out of the dataset's folder", _COPY)
        for sub in _links_out(folder)
    ]
    if problems:  # what is a link is not read, not even to see what it names
        return problems
    for where, named in _named_files(folder):
        plain = posixpath.normpath(named)
        if "://" in named or "::" in named:
            leaves, hint = True, "download those files to the dataset's folder"
        else:
            parent = PurePosixPath(where).parent if PurePosixPath(where).name in SAVED else PurePosixPath()
            try:
                leaves = plain.startswith(("/", "../")) or plain == ".." or folder.leads_out(parent / plain)
            except (OSError, RuntimeError, ValueError):
                leaves = True
            hint = "move the files to the dataset's folder"
        if leaves:
            message = f"{where} names {shortened(named)!r}, which is outside the dataset's folder"
            problems.append(finding("outside-folder", where, message, f"{hint}, or use --allow-outside"))
    return problems


def _links_out(folder: Folder) -> list[str]:
    """Return the folders that are links leading out, which the library would follow."""
    found = []
    for at in sorted({parent for file in folder.files for parent in file.parents} | {PurePosixPath()}):
        with os.scandir(folder.root / at) as entries:
            links = [entry.name for entry in entries if entry.is_symlink() and entry.is_dir()]
        found += [str(at / name) for name in links if folder.leads_out(at / name)]
    return found


def _named_files(folder: Folder) -> Iterator[tuple[str, str]]:
    """Yield every file name or pattern in the folder's descriptions, with the description.

    Raises:
        CogtuneError: a description is damaged.
    """
    for file in folder.files:
        if file.name == "state.json":
            for item in _of_type(_json(folder, file).get("_data_files", []), list, file, "_data_files"):
                entry = _of_type(item, dict, file, "_data_files")
                yield str(file), _of_type(entry.get("filename"), str, file, "filename")
        elif file.name == "dataset_dict.json":
            for split in _of_type(_json(folder, file).get("splits", []), list, file, "splits"):
                yield str(file), _of_type(split, str, file, "splits")
    if not _is_saved(folder):
        for name, value in _descriptions(folder):
            for text in _texts(value.get("configs")):
                yield name, text


def _descriptions(folder: Folder) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the declarations of data files: the metadata of the dataset card, and the file that overrides it.

    Raises:
        CogtuneError: one of them is not YAML.
    """
    import yaml
    from huggingface_hub.repocard import metadata_load

    for name, what in ((CARD, "the metadata of "), (OVERRIDE, "")):
        path = folder.root / name
        if not path.is_file():
            continue
        try:
            with os_errors_explained(path, "read"):
                value = metadata_load(path) if name == CARD else yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise CogtuneError(
                f"{what}{path} is not YAML: {str(error).splitlines()[0]}",
                "fix or remove it: it tells the datasets library which files are data",
            ) from error
        if isinstance(value, Mapping):
            yield name, value


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in a description; those that are not file names have no path that leads out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _json(folder: Folder, file: PurePosixPath) -> dict[str, Any]:
    return _of_type(read_json(folder.root / file), dict, file, "all of it")


T = TypeVar("T")


def _of_type(value: Any, kind: type[T], file: PurePosixPath, what: str) -> T:
    if not isinstance(value, kind):
        raise CogtuneError(
            f"{file} was not written by save_to_disk: {what} is {type(value).__name__}, not {kind.__name__}",
            "save the dataset again",
        )
    return value


def _refuse_own_files(folder: Folder) -> None:
    """Reject a folder that contains a run's files, since the library reads every clip in it.

    Raises:
        CogtuneError: cogtune wrote something to the folder.
    """
    _ = folder.files
    if folder.own:
        raise CogtuneError(
            f"{folder.root} also contains output of cogtune, which the datasets library would read: "
            f"{listed(folder.own, 5)}",
            "move it out of the dataset's folder, and choose an --output outside it",
        )


def _load(folder: Folder, media: Path) -> tuple[str, Any]:
    """Return the name of the split to read and its ``datasets.Dataset``, whose clips and images are not decoded.

    Raises:
        CogtuneError: the library is not installed or cannot read the folder, or has several splits and no train.
    """
    root = folder.root
    try:
        import datasets
    except ImportError as error:
        raise CogtuneError(
            f"reading {root} requires the datasets library, which is not installed",
            "run `pip install 'cogtune[datasets]'`",
        ) from error
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if _is_saved(folder):
            splits = datasets.load_from_disk(str(root))
        else:
            splits = datasets.load_dataset(str(root), cache_dir=str(media.parent / names.DATASETS))
        if isinstance(splits, datasets.Dataset):
            splits = {str(splits.split or "train"): splits}
        name = "train" if "train" in splits else next(iter(splits))
        if len(splits) > 1 and name != "train":
            raise CogtuneError(
                f"{root} has the splits {listed(list(splits))}, but none is called train",
                "save only the split to train on",
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
            "check that datasets.load_dataset can read that folder",
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    return name, table


def _rows(root: Path, table: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from table
    except (OSError, ValueError, RuntimeError) as error:
        raise CogtuneError(
            f"cannot read {root}: {str(error).splitlines()[0]}", "create or download it again"
        ) from error


def _file_of(value: Any, unnamed: str, root: Path, media: Path) -> tuple[Any, Path | None]:
    """Return a cell's path, and the file of its bytes if it holds any; any other value unchanged."""
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
    """Return the file that holds ``data``, written if it does not exist."""
    name = hashlib.blake2b(data, digest_size=16).hexdigest()
    path = media / name[:2] / f"{name}{suffix.lower()}"
    if not path.is_file() or path.stat().st_size != len(data):
        write_atomic(path, lambda aside: aside.write_bytes(data))
    return path


def _detect(folder: Folder) -> DataFormat | None:
    return "datasets" if _is_saved(folder) else None


DATASETS = Layout(
    ("datasets",),
    "a folder of the datasets library",
    "a folder that the datasets library saved or can load",
    _detect,
    _read,
    has_columns=True,
)
