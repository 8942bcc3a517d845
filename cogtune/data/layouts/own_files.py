"""Recognise what cogtune itself writes to a dataset's folder, so that it is never read as data.

Runs, checkpoints, a step's sample videos and caches are recognised by their contents, a video of ``cogtune infer`` by a
comment in the file, a quarantine file by its first line. Lists and tables are read whatever they name.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cogtune.system import names
from cogtune.system.files import open_regular

MARK = "sampled by cogtune"
"""The comment in the metadata of every video that cogtune samples."""

QUARANTINE_HEADER = "# samples to leave out: "
"""The beginning of a quarantine file."""

RUN_FILES = frozenset({names.METRICS, names.RUN_YAML, names.REPORT, names.MACHINE, names.TRACKERS, names.MERGE})
"""Files of a run's folder."""

_HEAD = 1 << 20
"""Bytes at a video's beginning that contain its metadata."""


def is_run(folders: Collection[str], files: Collection[str]) -> bool:
    """Return whether a folder with these files is a run's: it has a configuration and something of a run."""
    made = any(_of_run(name) or name == names.SAMPLES for name in folders)
    return made and (names.RUN_YAML in files or names.METRICS in files)


def is_own(name: str, folders: Collection[str], files: Collection[str]) -> bool:
    """Return whether everything in a folder of this name and content was written by cogtune."""
    return (
        is_run(folders, files)
        or (names.STATE in files and names.CHECKPOINT_NAME.fullmatch(name) is not None)
        or (names.SAMPLES_LIST in files and names.STEP_NAME.fullmatch(name) is not None)
        or (names.FACTS in files and names.ENTRIES[0] in folders)
    )


def of_run(name: str) -> bool:
    """Return whether a folder of this name in a run's folder is the run's; ``samples`` may have other contents."""
    return name == names.LOGS or _of_run(name)


def _of_run(name: str) -> bool:
    return (names.LAUNCH_NAME.fullmatch(name) or names.CHECKPOINT_NAME.fullmatch(name)) is not None


def is_generated(video: Path) -> bool:
    """Return whether a video was sampled by cogtune; False for one that cannot be read."""
    return _begins_with(video, MARK, _HEAD)


def is_quarantine(text: Path) -> bool:
    """Return whether a text file is a list of samples to leave out, written by ``dataset validate``."""
    return _begins_with(text, QUARANTINE_HEADER, len(QUARANTINE_HEADER))


def _begins_with(path: Path, text: str, most: int) -> bool:
    """Return whether ``text`` is within the first ``most`` bytes of a file."""
    try:
        if not path.is_file():  # a pipe would be waited for without end
            return False
        with open_regular(path) as file:
            return text.encode() in file.read(most)
    except OSError:
        return False
