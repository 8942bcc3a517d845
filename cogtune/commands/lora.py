"""What ``cogtune lora`` does with LoRA files of any program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogtune.models.lora_formats import LORA_FORMATS, LoraFormatName
from cogtune.models.variants import Precision
from cogtune.run.lora_paths import OF_ADAPTER, file_and_weight, find_lora
from cogtune.system import console
from cogtune.system.errors import CogtuneError, UsageError, counted

if TYPE_CHECKING:
    from cogtune.merge.fuse import Fused
    from cogtune.modeling.lora_files import Lora
    from cogtune.modeling.lora_files.editing import Edited

Weighted = tuple[Path, float]
"""A LoRA, and what its strength is multiplied by."""


def weighted(text: str) -> Weighted:
    """Return the path and the weight that ``FILE`` or ``FILE:WEIGHT`` means.

    Raises:
        UsageError: as for :func:`file_and_weight`.
    """
    file, weight = file_and_weight(text)
    return Path(file), weight


def read(path: Path, alpha: float | None = None) -> Lora:
    """Return the LoRA that ``path`` means.

    Args:
        alpha: what it was trained with, for a file that does not say.

    Raises:
        CogtuneError: it cannot be read.
        UsageError: there is none, or it says its alpha itself, or ``alpha`` is not above 0.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise UsageError(f"--lora-alpha {alpha:g}: must be greater than 0", "a common choice is the rank")
    file = find_lora(path)
    from cogtune.modeling.lora_files import read_lora  # which imports torch

    lora = read_lora(file)
    if alpha is None:
        return lora
    if not lora.without_alpha:
        raise UsageError(
            f"--lora-alpha: {lora.path} already records an alpha of {lora.alphas[0]:g}",
            "remove --lora-alpha; use a weight (FILE:0.5) to change the strength",
        )
    return lora.with_alpha(alpha)


def show(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what there is to say of each file.

    Raises:
        CogtuneError: with all files that cannot be read.
    """
    loras, failures = [], []
    for file in files:
        try:
            loras.append(read(file))
        except CogtuneError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise CogtuneError(f"cannot read {len(failures)} files", details=[str(error) for error in failures])
    from cogtune.modeling.lora_files.describing import describe

    return [describe(lora) for lora in loras]


def convert(
    file: Path, output: Path, lora_format: LoraFormatName, *, alpha: float | None = None, force: bool = False
) -> Lora:
    """Write a LoRA in another program's format.

    Raises:
        CogtuneError: it cannot be read or written.
        UsageError: ``output`` is there already.
    """
    lora = read(file, alpha)
    if lora.without_alpha:
        _warn_of_strength(lora)
    write(lora, output, lora_format, force=force)
    return lora


def resize(
    file: Path,
    output: Path,
    rank: int,
    *,
    lora_format: LoraFormatName = "diffusers",
    alpha: float | None = None,
    dtype: Precision | None = None,
    force: bool = False,
) -> Edited:
    """Write a LoRA with a lower rank.

    Raises:
        CogtuneError, UsageError: as for :func:`convert`; the rank would not be lower.
    """
    lora = read(file, alpha)
    from cogtune.modeling.lora_files.editing import resize as cut

    made = cut(lora, rank, dtype=_dtype(dtype))
    write(made.lora, output, lora_format, force=force)
    return made


def merge(
    files: Sequence[Weighted],
    output: Path,
    *,
    rank: int | None = None,
    lora_format: LoraFormatName = "diffusers",
    alpha: float | None = None,
    dtype: Precision | None = None,
    force: bool = False,
) -> Edited:
    """Write several LoRAs as one.

    Raises:
        CogtuneError, UsageError: as for :func:`convert`; they do not go together.
    """
    loras = _read_all(files, alpha)
    from cogtune.modeling.lora_files.editing import blend

    made = blend(loras, output, rank=rank, dtype=_dtype(dtype))
    write(made.lora, output, lora_format, force=force)
    return made


def fuse(
    files: Sequence[Weighted],
    model: str,
    output: Path,
    *,
    alpha: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Fused:
    """Write a base model with LoRAs in its weights.

    Args:
        options: those of :func:`cogtune.merge.fuse.fuse`.

    Raises:
        CogtuneError, UsageError: as that does.
    """
    loras = _read_all(files, alpha)
    from cogtune.merge.fuse import fuse as write_fused
    from cogtune.models.locate import locate

    return write_fused(loras, locate(model), output, progress=progress, warn=console.warn, **options)


def extract(
    full: Path,
    base: str,
    output: Path,
    rank: int,
    *,
    targets: Sequence[str] = (),
    lora_format: LoraFormatName = "diffusers",
    dtype: Precision = "fp32",
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Write a LoRA of the difference between two models.

    Raises:
        CogtuneError, UsageError: as :func:`cogtune.merge.extract.extract` does; ``output`` is there already.
    """
    from cogtune.merge.extract import extract as difference
    from cogtune.modeling.devices import DTYPES
    from cogtune.models.locate import locate

    _check_free(output, lora_format, force)
    if not full.is_dir():
        raise UsageError(f"no such folder: {full}", "pass the fine-tuned model: a run, a checkpoint or a merged folder")
    made = difference(
        full, locate(base), rank=rank, targets=targets, dtype=DTYPES[dtype], model=base, progress=progress
    )
    write(made.edited.lora, output, lora_format, force=force)
    return made


def write(lora: Lora, output: Path, lora_format: LoraFormatName, *, force: bool = False) -> None:
    """Write a LoRA, read it back, and see that it is the same.

    Raises:
        UsageError: ``output`` is there already, or not of the kind that the format needs.
        CogtuneError: it cannot be written, or comes back as another.
    """
    from cogtune.modeling.lora_files import read_lora
    from cogtune.modeling.lora_files.writing import differences, write_lora

    _check_free(output, lora_format, force)
    for told in write_lora(lora, output, lora_format, warn=console.warn):
        console.note(told)
    if wrong := differences(lora, read_lora(find_lora(output)), LORA_FORMATS[lora_format]):
        raise CogtuneError(f"{output} differs from what was written", "check the disk", details=wrong[:5])


def _check_free(output: Path, lora_format: LoraFormatName, force: bool) -> None:

    folder = LORA_FORMATS[lora_format].alpha == "folder"
    if not folder and output.suffix != ".safetensors":
        raise UsageError(f"--output {output}: the file name must end in .safetensors", "choose such a name")
    if folder and output.suffix == ".safetensors":
        raise UsageError(f"--output {output}: the {lora_format} format is a folder", "pass a folder's name")
    if output.is_dir() and not folder:
        raise UsageError(f"--output {output} is a folder", "pass a file's name")
    if output.exists() and folder and not output.is_dir():
        raise UsageError(f"--output {output} is a file", "pass a folder's name")
    if output.is_dir() and (others := sorted(path.name for path in output.iterdir() if path.name not in OF_ADAPTER)):
        raise UsageError(
            f"--output {output} contains {others[0]}, which is no part of an adapter, and would be deleted",
            "choose another --output",
        )
    if output.exists() and not force:
        raise UsageError(f"{output} already exists", "choose another --output, or use --force to replace it")


def _read_all(files: Sequence[Weighted], alpha: float | None) -> list[tuple[Lora, float]]:
    """Return the LoRAs; ``alpha`` is that of those that do not say theirs."""
    loras = [(read(path), weight) for path, weight in files]
    silent = [lora for lora, _ in loras if lora.without_alpha]
    if alpha is not None:
        if not silent:
            raise UsageError("--lora-alpha: all of these LoRAs record their alpha", "remove --lora-alpha")
        return [(read(path, alpha if lora.without_alpha else None), weight)
                for (path, weight), (lora, _) in zip(files, loras, strict=True)]  # fmt: skip
    for lora in silent:
        _warn_of_strength(lora)
    return loras


def _warn_of_strength(lora: Lora) -> None:
    which = "" if len(lora.without_alpha) == len(lora.pairs) else f" of {counted(len(lora.without_alpha), 'layer')}"
    console.warn(
        f"{lora.path} does not record the alpha{which}; assuming the rank, {lora.ranks[0]}. Use --lora-alpha to "
        "change it"
    )


def _dtype(name: Precision | None) -> Any:
    from cogtune.modeling.devices import DTYPES

    return None if name is None else DTYPES[name]
