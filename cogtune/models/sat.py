"""Recognising checkpoints of CogVideo's SAT, whose weights have other names than diffusers'. Needs no torch."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cogtune.system.containment import leads_out
from cogtune.system.errors import CogtuneError

_STATES = "mp_rank_00_model_states.pt"
"""The file of weights in a folder that SAT writes, as DeepSpeed calls it."""

_MOST_DESCRIPTION = 1 << 24
"""Bytes of the description of a file's tensors that are searched for names; that of 5b has a few hundred KB."""


def refuse_sat(path: Path) -> None:
    """Reject a file or folder of SAT: a checkpoint, its numbered folder, or a published model's folder.

    Raises:
        CogtuneError: it is one; the hint says how to convert it.
    """
    for file in [path] if path.is_file() else _states_in(path):
        refuse_sat_names(path, [_description(file)])


def refuse_sat_names(checkpoint: Path, names: Iterable[str]) -> None:
    """Reject a checkpoint by the names of its weights, or by texts that contain them.

    Raises:
        CogtuneError: SAT wrote it; the hint says how to convert it.
    """
    named = [name for name in names if "diffusion_model." in name]
    if not any(".transformer.layers." in name or ".mixins." in name for name in named):
        return
    adapter = any(".matrix_A." in name for name in named)
    convert = "tools/export_sat_lora_weight.py" if adapter else "tools/convert_weight_sat2hf.py"
    then = "pass what it writes as --lora" if adapter else "pass a model's folder with what it writes as --model"
    raise CogtuneError(
        f"{checkpoint} is a checkpoint of CogVideo's SAT, {'with a LoRA, ' if adapter else ''}which is not supported",
        f"convert it with CogVideo's {convert}, and {then}",
    )


def _states_in(path: Path) -> Iterator[Path]:
    """Yield the files of weights in a folder, its transformer's, and their subfolders; no links to files elsewhere."""
    for folder in (path, path / "transformer"):
        files = (folder / _STATES, *folder.glob(f"*/{_STATES}"))
        yield from (file for file in files if file.is_file() and not leads_out(file, path))


def _description(file: Path) -> str:
    """Return the bytes that describe the tensors in a file of ``torch.save``, as text; empty for any other file."""
    with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:  # a damaged one may raise anything
        for record in archive.infolist():
            if record.filename.endswith("/data.pkl"):
                with archive.open(record) as description:
                    return description.read(_MOST_DESCRIPTION).decode("latin-1")
    return ""
