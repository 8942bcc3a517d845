"""Importers of other programs' training scripts and configurations for CogVideoX, as keys of ``run.yaml``.

:mod:`.shell` finds the command that a shell script runs, :mod:`.reading` the flags that this command or a config file
sets, :mod:`.flags` maps flags to keys, and :mod:`.translating` makes a configuration of them.
"""

from cogtune.config.importers.reading import Given, read
from cogtune.config.importers.translating import Imported, Remark, translate

__all__ = ["Given", "Imported", "Remark", "read", "translate"]
