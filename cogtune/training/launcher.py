"""``accelerate launch`` in a process that ends with the command that started it.

Started by :mod:`cogtune.run.launch` as a module, with the arguments of ``accelerate launch``.
"""

from __future__ import annotations

import sys

from cogtune.system import console
from cogtune.system.children import GRACE, end_with_command
from cogtune.system.first_death import Death
from cogtune.system.garbage import no_collections


def main() -> None:
    """Run ``accelerate launch``, which exits with its own status, and say which process died first."""
    end_with_command(lambda: GRACE + 1)  # the workers have until then, and one of them a checkpoint to write
    sys.stdout, sys.stderr = console.lenient(sys.stdout), console.lenient(sys.stderr)
    with no_collections():
        from accelerate.commands.accelerate_cli import main as accelerate
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    sys.argv[:1] = ["accelerate", "launch"]
    try:
        accelerate()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        Death(first.pid, max(0, -first.exitcode)).tell()
        raise


if __name__ == "__main__":
    main()
