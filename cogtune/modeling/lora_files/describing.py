"""What there is to say of a LoRA file, as JSON-able values and as lines of a table."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from cogtune.modeling.lora_files.reading import Lora, fitting_models

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_RUN = ("base_model", "step", "steps", "size", "fps", "precision", "id_token", "prompt")


def describe(lora: Lora) -> dict[str, Any]:
    """Return everything about a LoRA that decides how it is used; ranks and alphas are lists of all that occur."""
    tensors = [tensor for pair in lora.pairs.values() for tensor in (pair.down, pair.up)]
    tensors += [pair.magnitude for pair in lora.pairs.values() if pair.magnitude is not None]
    strengths = sorted({lora.scale_of(name) for name in lora.pairs})
    return {
        "file": str(lora.path),
        "bytes": lora.path.stat().st_size,
        "written_by": "cogtune" if lora.facts else lora.source_format,
        "kind": "DoRA" if lora.dora else "LoRA",
        "rank_stabilised": lora.rslora,
        "ranks": lora.ranks,
        "alphas": [None] if len(lora.without_alpha) == len(lora.pairs) else lora.alphas,
        "strength_known": not lora.without_alpha,
        "strengths": strengths,
        "targets": _targets(lora),
        "layers": len(lora.pairs),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "changes_nothing": lora.changes_nothing,
        "fits": fitting_models(lora),
        "run": {key: lora.facts[key] for key in _RUN if lora.facts.get(key) not in (None, "")},
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the same as a table's lines."""
    kind = found["kind"] + (", rank-stabilised" if found["rank_stabilised"] else "")
    known = found["strength_known"]
    strength = _several(found["strengths"])
    lines = [
        ("written by", found["written_by"]),
        ("kind", kind + (", changes nothing: every B is 0" if found["changes_nothing"] else "")),
        ("rank", _several(found["ranks"])),
        ("alpha", _several(found["alphas"]) if found["alphas"] != [None] else "not in the file"),
        (
            "strength",
            strength if known else f"not known: used as {strength}; pass --lora-alpha if it was trained with another",
        ),
        ("targets", ", ".join(f"{name} ({count})" for name, count in found["targets"].items())),
        ("size", f"{found['parameters']:,} numbers of {', '.join(found['dtypes'])}, {found['bytes'] / 1e6:.1f} MB"),
        ("fits", ", ".join(found["fits"]) or "none of the published models"),
    ]
    return lines + [(f"run: {key}", str(value)) for key, value in found["run"].items()]


def _several(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:g}"
    return f"{min(values):g} to {max(values):g} ({len(values)} different)"


def _targets(lora: Lora) -> dict[str, int]:
    """Return the kinds of layers, by the ends of their names, and how many there are of each."""
    ends = (match[2] if (match := _BLOCK.fullmatch(name)) else name for name in lora.pairs)
    return dict(Counter(end.removeprefix("attn1.") for end in ends))
