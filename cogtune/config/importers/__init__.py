"""Scripts and configurations of other programs that train CogVideoX, turned into keys of ``run.yaml``.

:mod:`.shell` finds out which command a shell script runs, :mod:`.reading` which flags that or a file of keys sets,
:mod:`.flags` says of each flag where it goes, :mod:`.translating` makes a configuration of them.
"""

from cogtune.config.importers.reading import Given, read
from cogtune.config.importers.translating import Imported, Remark, translate

__all__ = ["Given", "Imported", "Remark", "read", "translate"]
