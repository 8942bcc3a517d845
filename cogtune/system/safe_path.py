"""Keeps the working folder off the path that modules are imported from: it may be a dataset of somebody else's.

Imports nothing that Python has not loaded by itself, not even ``__future__``, so that nothing is looked for before the
path is clean.
"""

import os
import sys

STANDARD_LIBRARY = os.path.dirname(os.__file__)  # noqa: PTH120 (pathlib is not loaded yet)
"""Where our processes start. ``python -m`` and ``python -c`` put the folder they start in first on the path, and up to
Python 3.10 nothing but the folder itself can keep them from it; this one is on the path anyway."""

_HOME = os.path.realpath(os.path.join(__file__, "..", "..", ".."))  # noqa: PTH118 (the folder that holds cogtune)


def search_path() -> list[str]:
    """Return ``sys.path`` with absolute entries, without the working folder, unless cogtune itself was imported from
    it."""
    try:
        here = os.path.realpath(os.getcwd())  # noqa: PTH109
    except OSError:  # it was deleted
        here = ""
    absolute = [os.path.abspath(entry) for entry in sys.path if entry or here == _HOME]  # noqa: PTH100
    kept = (_HOME, os.path.realpath(STANDARD_LIBRARY))
    return [entry for entry in absolute if os.path.realpath(entry) != here or here in kept]


def has_working_folder() -> bool:
    """Return whether the working folder exists: paths are relative to it, and libraries ask for it."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError:
        return False
    return True


def leave_working_folder_out() -> None:
    """Take the working folder off this process's path, and off that of the interpreters that it starts."""
    sys.path[:] = search_path()
    os.environ["PYTHONSAFEPATH"] = "1"  # heard from Python 3.11 on
