"""Keeping the working folder, which may be an untrusted dataset, off the import path.

Imports only modules that Python itself has already loaded, not even ``__future__``, so that nothing is searched for
before the path is clean.
"""

import os
import sys

STANDARD_LIBRARY = os.path.dirname(os.__file__)  # noqa: PTH120 (pathlib is not loaded yet)
"""The folder that child processes start in. ``python -m`` and ``python -c`` put their working folder first on the path,
which cannot be prevented up to Python 3.10. This folder is on the path anyway."""

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
    """Return whether the working folder still exists; paths are relative to it, and libraries need it."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError:
        return False
    return True


def leave_working_folder_out() -> None:
    """Remove the working folder from the import path of this process and of interpreters that it starts."""
    sys.path[:] = search_path()
    os.environ["PYTHONSAFEPATH"] = "1"  # respected by Python 3.11 and later
