"""``docs/vram.md``, made from the recorded measurements: ``python -m tools.vram_page``."""

from __future__ import annotations

from collections.abc import Sequence

from cogtune.config.presets import PRESETS, Preset
from cogtune.config.resolving import resolve
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.locate import spec_of
from cogtune.models.variants import VARIANTS
from cogtune.planning.estimate import GIB, estimate
from cogtune.planning.fit import GB
from cogtune.planning.measurements import Measurement, of_preset, recorded
from cogtune.system import console

_HEAD = """# Memory and time of every preset

Made by `make docs` from `cogtune/planning/measurements.json`. Each measurement is a run of `cogtune bench` (see
[Bench](bench.md)), which trains on random weights of the real size; run the same command to repeat it. The estimates
are those of `cogtune plan` (see [Plan](plan.md)), for as many GPUs as the preset names; a test holds them to within
8 % of every measurement. The LoRA presets use the memory engine; until they are measured with it, the figures are those
without it (`--vram off`). GB are 10^9 bytes, as GPUs are sold, and count everything on the fullest GPU; GiB are 2^30
bytes of PyTorch's reserved memory. *The guides* are the public CogVideoX fine-tuning guides."""

_MEASURED = """## The measurements

Presets for eight GPUs were measured on as many as were available: on four, each GPU has shards of twice the size (of
5b's optimizer 16.7 GB instead of 8.4). *1 of 8* is one process of eight on one GPU (`--alone`): on the GPU, the
memory that NCCL needs for several is missing (1.4 GB on four H100), and its step has no communication. *plain* is the
guides' recipe in the same run: base in fp32, nothing compiled, full gradient checkpointing."""


def page(rows: Sequence[Measurement]) -> str:
    """Return the whole page, as Markdown."""
    lines = [
        "| preset | the guides promise | measured, whole GPU | on | PyTorch | host | a step | estimated, whole GPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_preset_line(row, rows) for row in PRESETS.values() if row.promised_gb is not None),
    ]
    made = [
        "| command | recipe | on | whole GPU | PyTorch reserved | host | a step | start-up | date | versions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_measurement_line(row) for row in rows),
    ]
    measured = "\n".join(made) if rows else "None is recorded yet."
    return "\n\n".join([_HEAD, "\n".join(lines), _MEASURED, measured]) + "\n"


def _preset_line(row: Preset, rows: Sequence[Measurement]) -> str:
    measured = of_preset(row.name, rows)
    spec = published_spec(VARIANTS[row.model])
    needs = estimate(resolve(preset_name=row.name).config, spec)
    figures, without = ["not measured", "", "", "", ""], ""
    if measured is None:
        same = [one for one in rows if (one.preset, one.recipe, one.changes) == (row.name, "preset", {"vram": "off"})]
        measured, without = max(same, key=lambda one: one.date, default=None), " with `--vram off`"
    if measured is not None:
        figures = [
            measured.whole_card + without,
            measured.place,
            f"{measured.peak_gib:.1f} GiB",
            _gib(measured.host_gib),
            f"{measured.step_s:.2f} s",
        ]
    cells = [f"`{row.name}`", f"{row.promised_gb:g} GB", *figures, f"{needs.memory.card / GB:.1f} GB"]
    return _line(cells)


def _measurement_line(row: Measurement) -> str:
    packages = ("cogtune", "torch", "diffusers", "deepspeed")
    versions = ", ".join(f"{name} {row.versions[name]}" for name in packages if name in row.versions)
    spread = f" ({row.step_s_range[0]:.2f} to {row.step_s_range[1]:.2f})" if row.step_s_range else ""
    return _line(
        [
            f"`{row.command}`",
            row.recipe,
            row.place,
            row.whole_card,
            " ".join(f"{size:.1f}" for size in row.reserved_gib) + " GiB",
            _gib(row.host_gib),
            f"{row.step_s:.2f} s{spread}",
            f"{row.start_s:.0f} s" if row.start_s is not None else "",
            row.date,
            versions,
        ]
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} GiB"


def errors(rows: Sequence[Measurement]) -> list[tuple[str, str, str, str]]:
    """For each measurement of a preset: the run, the measured peak, the estimated one, and how far off it is."""
    found = []
    for row in rows:
        if row.recipe == "preset" and row.preset in PRESETS:
            spec = spec_of(row.config.model)
            needs = estimate(row.config, spec, gpu=row.gpu, alone=row.alone, arrangement=row.planned)
            mine = needs.memory.reserved / GIB
            found.append(
                (row.command, f"{row.peak_gib:.2f}", f"{mine:.2f}", f"{100 * (mine / row.peak_gib - 1):+.1f} %")
            )
    return found


if __name__ == "__main__":
    console.say(page(recorded()).rstrip("\n"))
