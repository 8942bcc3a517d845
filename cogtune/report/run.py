"""The report of a run, from the files in its folder: progress, sample videos and provenance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import Field

from cogtune import __version__
from cogtune.report.comparison import comparison_section
from cogtune.report.curves import Curves, change, curves, loss_charts, smooth, step_charts, window_of
from cogtune.report.page import Html, facts, section, table, tag, write_page
from cogtune.report.videos import video_section
from cogtune.run.folder import RUN_NAME, RunFolder
from cogtune.system import console, names
from cogtune.system.containment import refuse_links_out
from cogtune.system.errors import CogtuneError
from cogtune.system.files import os_errors_explained, read_bytes, read_regular
from cogtune.system.json_files import CHECKSUM, MOST_JSON, is_sealed, read_json, write_sealed
from cogtune.system.reading import S, Schema, abridged, read_as
from cogtune.system.versions import machine

"""Name of the page in a run's folder."""

"""Name of the file in a run's launch folder with its machine and versions."""


def record_machine(launch: Path) -> None:
    """Write the run's machine and versions for its report."""
    write_sealed(launch / names.MACHINE, machine())


_Count = Annotated[int, Field(ge=0, le=10**12)]
_Figure = Annotated[float, Field(ge=0, le=1e12)]

State = Literal["running", "stopping", "ended"]


def write_run_report(output: Path, state: State = "ended") -> Path:
    """Write the page of the run in ``output``; return its path.

    Args:
        state: of the run; the reports of its processes tell whether an ended run succeeded.

    Raises:
        CogtuneError: the folder is not a run, or the page cannot be written.
    """
    from cogtune.run.metrics import read_metrics

    if not RunFolder(output).is_run:
        raise CogtuneError(
            f"{output} is not a run folder: it has no {RUN_NAME}", "pass the --output folder of a training run"
        )
    refuse_links_out(output)
    path = RunFolder(output).page
    with os_errors_explained(RunFolder(output).metrics, "read"):
        found = curves(read_metrics(RunFolder(output).metrics))
    write_page(path, f"{output.absolute().name} · run report", _parts(output.absolute(), found, state))
    return path


def _parts(output: Path, found: Curves, state: State) -> Iterator[Html]:
    plan = _read(RunFolder(output).plan, _Plan)
    yield _header(output, plan, found, state)
    yield from loss_charts(found)
    yield from video_section(output)
    yield from comparison_section(RunFolder(output).comparison)
    yield from step_charts(found)
    yield from _configuration(RunFolder(output).run_yaml)
    yield from _made_from(output, plan)
    yield tag("footer", f"Made by cogtune {__version__}; run `cogtune report` to update it.")


class _Plan(Schema):
    """The parts of ``plan.json`` on the page."""

    config: dict[str, Any] = Field(default_factory=dict)
    identity: dict[str, Any] = Field(default_factory=dict)
    size: str | None = None
    fps: _Figure | None = None
    tokens: _Count | None = None
    samples: _Count | None = None
    total_steps: _Count | None = None
    resume: str | None = None


class _RankReport(Schema):
    """The last report of one of the run's processes."""

    status: str = ""
    message: str = ""


class _Card(Schema):
    name: str
    memory_gib: _Figure


class _Machine(Schema):
    """The result of :func:`cogtune.system.versions.machine`."""

    gpus: list[_Card] | None = None
    cpus: _Count | None = None
    memory_gib: _Figure | None = None
    system: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


def _is_blank(path: Path) -> bool:
    """Return whether a process reserved its report, but has not written it."""
    return not read_bytes(path, MOST_JSON).strip()


def _read(path: Path, schema: type[S]) -> S:
    """Read a file of the run; None if it is missing, or with a warning if it is damaged."""
    try:
        if path.exists() and not (schema is _RankReport and _is_blank(path)):
            value = read_json(path)
            if isinstance(value, dict) and CHECKSUM in value and not is_sealed(value):
                raise CogtuneError(f"{path} is damaged", "")
            return read_as(path, schema)
    except CogtuneError as error:
        for problem in error.details or (error.message,):
            console.warn(f"not in the report: {problem}")
    return schema()


# ---------------------------------------------------------------------------------------------- how it goes


def _header(output: Path, plan: _Plan, found: Curves, state: State) -> Html:
    config = plan.config
    lead = [config.get("model"), config.get("type"), plan.size, config.get("strategy")]
    return tag(
        "header",
        tag("p", "Run report", class_="kind"),
        tag("h1", output.name),
        tag("p", " · ".join(str(part) for part in lead if part), class_="lead"),
        _verdict(output, plan, found, state),
        facts(_figures(plan, found)),
    )


def _verdict(output: Path, plan: _Plan, found: Curves, state: State) -> Html:
    done, total = found.last_step, plan.total_steps
    said = _read(RunFolder(output).launch() / "rank-0.json", _RankReport)
    more = f"{done:,} of {total:,} steps are done." if total else f"{done:,} steps are done."
    if said.status == "failed":
        kind, word, more = "error", "Failed.", f"{said.message}. {more}"
    elif total is not None and done >= total and state == "ended" and said.status != "stopped":
        kind, word, more = "ok", "Finished.", f"All {total:,} steps are done."
    else:  # after the last step, too, where its losses and videos are still due
        kind, word = "note", "Running." if state == "running" else "Not finished."
    return tag("p", tag("b", word), " ", tag("span", more), class_=f"verdict {kind}")


def _figures(plan: _Plan, found: Curves) -> Iterator[tuple[str, Html | str]]:
    total = plan.total_steps
    yield "Steps", tag("span", f"{found.last_step:,}", tag("small", f"of {total:,}") if total else None)
    for name, title in (("eval_loss", "Loss at fixed noise"), ("validation_loss", "Validation loss")):
        measured = change(found[name])
        if measured is not None:
            yield title, measured
    loss = found["loss"]
    if loss:
        yield "Training loss", f"{smooth(loss, window_of(loss))[-1][1]:.4g}"
    seconds = [value for _, value in found["seconds"]]
    if seconds:
        middle = median(seconds)
        yield "Time per step", tag("span", _time(middle), tag("small", f"{_time(sum(seconds))} in all"))
        if total and total > found.last_step:
            left = _time((total - found.last_step) * middle)
            yield "Time left", tag("span", left, tag("small", "at this pace"))
    memory = found["memory_gib"]
    if memory:
        yield "Memory", f"{max(value for _, value in memory):.3g} GiB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


# ------------------------------------------------------------------------------------- what it was made from

_LINE = re.compile(r"(\w+): (.*)  # (.*)")


def read_provenance(run_yaml: Path) -> list[tuple[str, str, str]]:
    """Read key, value and source of every line of a run's ``run.yaml``; empty if it is missing."""
    try:
        lines = read_regular(run_yaml).decode().splitlines()
    except (OSError, ValueError):
        return []
    return [(match[1], match[2], match[3]) for line in lines if (match := _LINE.fullmatch(line))]


def _configuration(run_yaml: Path) -> Iterator[Html]:
    rows = read_provenance(run_yaml)
    if not rows:
        return
    columns = ("key", "value", "from")
    chosen = [_setting(*row) for row in rows if row[2] != "default"]
    left = [_setting(*row) for row in rows if row[2] == "default"]
    more = tag(
        "details",
        tag("summary", f"{len(left)} more at their defaults"),
        table(columns, left, label="Settings at their defaults"),
    )
    yield section("Configuration", table(columns, chosen, label="Settings") if chosen else None, more if left else None)


def _setting(key: str, value: str, source: str) -> tuple[Html, Html, str]:
    return tag("code", key), tag("code", value), source


def _made_from(output: Path, plan: _Plan) -> Iterator[Html]:
    config, fingerprint = plan.config, plan.identity
    there = _read(RunFolder(output).machine, _Machine)
    cards = [f"{card.name} ({card.memory_gib} GiB)" for card in there.gpus or ()]
    cpu = f"{there.cpus} CPUs, {there.memory_gib} GiB, {there.system}" if there.system is not None else None
    rows: list[tuple[str, Html | str | float | None]] = [
        ("base model", _text(config.get("model"))),
        ("its transformer's fingerprint", _code(fingerprint.get("model"))),
        ("dataset", _code(config.get("data"))),
        ("samples", plan.samples),
        ("dataset's digest", _code(fingerprint.get("data"))),
        ("frames x height x width", plan.size),
        ("frames per second", plan.fps),
        ("tokens per sample", plan.tokens),
        ("samples per step", _text(fingerprint.get("samples per step"))),
        ("resumed from", _code(plan.resume)),
        ("GPUs", ", ".join(cards) or (None if there.gpus is None else "none")),
        ("machine", cpu),
        *there.versions.items(),
    ]
    known = [(name, value if isinstance(value, str) else f"{value:,}") for name, value in rows if value is not None]
    if known:
        yield section("Provenance", table((), known, label="Provenance of the run"))


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else abridged(value)


def _code(value: object) -> Html | None:
    return None if value is None else tag("code", _text(value))
