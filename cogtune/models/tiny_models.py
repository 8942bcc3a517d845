"""The tiny models: where they lie, and what sets their weights apart. Without torch, unless one has to be made."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path

from cogtune.models.download import made_once
from cogtune.models.random_configs import scheduler_config, text_encoder_config, transformer_config, vae_config
from cogtune.models.variants import BuiltIn, Variant
from cogtune.system.digests import digest

_WRITE_PIPELINE = "cogtune.modeling.random_weights:write_pipeline"
"""Named rather than imported, since it needs torch and this package does without."""

_FORMAT = 1
"""Raise it when the files of a tiny pipeline change for a reason that :func:`tiny_model` cannot see."""

# How a tiny model's first weights differ from torch's own: see _widen_transformer_init and _widen_vae_init.
GATE_BIAS = 1.0
EMBEDDING_GAIN = 0.5
OUTPUT_GAIN = 1.5
LATENT_GAIN = 3.0
LOGVAR_BIAS = -6.0

WORDS = """
a an the this that of in on at to from by with and or is are it its over under across behind beside between around
through into out up down left right slowly quickly gently smoothly once twice again together red green blue yellow
white black orange purple grey pink brown golden silver bright dark pale colour circle square triangle star ring
disc diamond line dot ball box wave shape shapes pattern checkerboard gradient background foreground corner centre
edge top bottom moves moving slides sliding rolls rolling bounces bouncing spins spinning turns turning grows
growing shrinks fades drifting rising falling flying swings zigzags orbits crosses passes stops starts motion
speed camera film video clip frame scene shot view close wide still animation cartoon drawing light shadow pan
zoom man woman child dog cat bird horse mouse boat steamboat ship wheel river water sea sky cloud rain snow sun
moon morning evening day night city street house tree forest flower grass mountain field road car train window
door table small large big tiny round long short old new fast slow quiet loud happy one two three four five six
seven eight nine ten many few several no stands sits walks runs jumps dances looks smiles whistles steers waves
holds plays sings
""".split()  # noqa: SIM905 - a list of a word a line would fill screens
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 .,;:!?'\"()-/&%+#"


def tiny_model(name: str) -> Path:
    """Return the tiny pipeline of variant ``name`` in the user's cache folder, made at the first call.

    The cache folder is ``$COGTUNE_HOME``, or ``~/.cache/cogtune``. Several processes may ask at once.

    Raises:
        UsageError: there is no such variant.
        CogtuneError: the cache folder cannot be written.
    """
    row = BuiltIn("tiny", name).variant
    configs = [make(row, "tiny") for make in (transformer_config, vae_config, text_encoder_config, scheduler_config)]
    gains = [GATE_BIAS, EMBEDDING_GAIN, OUTPUT_GAIN, LATENT_GAIN, LOGVAR_BIAS]
    version = digest([_FORMAT, configs, gains, WORDS])[:12]

    def write(folder: Path) -> None:
        write_pipeline: Callable[[Variant, Path], Path] = pkgutil.resolve_name(_WRITE_PIPELINE)
        write_pipeline(row, folder)

    return made_once("tiny", f"{row.name}-{version}", write)
