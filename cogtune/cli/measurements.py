"""Record what ``cogtune bench --json FILE`` measured: ``python -m cogtune.cli.measurements FILE...``."""

from __future__ import annotations

import sys
from pathlib import Path

from cogtune import console
from cogtune.measurements import add, read

if __name__ == "__main__":
    for name in sys.argv[1:]:
        console.say(f"{name}: {add(read(Path(name)))} measurements are recorded now")
