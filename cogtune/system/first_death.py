"""Which of several processes died first, as reported by their launcher to the process that watches it."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from cogtune.system.errors import CogtuneError
from cogtune.system.files import write_text

FIRST_DEATH = "COGTUNE_FIRST_DEATH"
"""Environment variable: the file in which a launcher reports which of its processes died first, and how."""


@dataclass(frozen=True)
class Death:
    """The process that died first, by the time in the launcher's records; the others' failures follow from it."""

    pid: int
    signal: int
    """The signal that killed it; 0 if it ended by itself."""

    def tell(self) -> None:
        """Report this to the process that watches the launcher, if there is one."""
        if path := os.environ.get(FIRST_DEATH):
            with contextlib.suppress(CogtuneError):
                write_text(Path(path), json.dumps(asdict(self)))


def read_death(path: Path) -> Death | None:
    """Read a launcher's report; None if it wrote none."""
    try:
        return Death(**json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None
