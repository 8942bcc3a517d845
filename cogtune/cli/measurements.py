"""Record what ``cogtune bench --json FILE`` measured: ``python -m cogtune.cli.measurements FILE...``.

Shows how far off the estimate of each recorded peak is; ``make docs`` puts them into docs/vram.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cogtune import console
from cogtune.cli.vram import errors
from cogtune.measurements import FILE, add, read

if __name__ == "__main__":
    for name in sys.argv[1:]:
        add(read(Path(name)))
    console.table("", ("command", "reserved GiB", "estimated", "off by"), errors(read(FILE)))
