"""``cogtune import``: turn another program's script or configuration into a ``run.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cogtune.config.importers import Imported, read, translate
from cogtune.config.resolving import resolve
from cogtune.planning.estimate import check_arrangement
from cogtune.run.plan import check_config
from cogtune.system.errors import UsageError
from cogtune.system.files import write_text
from cogtune.system.folders import remove_leftovers


def import_run(path: Path, output: Path, *, leave_out: Sequence[str] = (), force: bool = False) -> Imported:
    """Write a script's settings as a configuration, after checking that ``cogtune plan`` accepts it.

    Args:
        leave_out: unknown flags to ignore.
        force: replace an existing file.

    Raises:
        UsageError: the script cannot be imported as is, its model does not support it, or ``output`` already exists.
        CogtuneError: a file cannot be read or written.
    """
    if output.exists() and not force:
        raise UsageError(f"{output} already exists", "choose another --output, or use --force to replace it")
    made = translate(read(path), leave_out=leave_out)
    assert made.spec is not None
    config = resolve(flags=made.values).config
    check_config(config, made.spec)
    check_arrangement(config, made.spec)
    remove_leftovers(output.parent, output.name)
    write_text(output, made.to_yaml())
    return made
