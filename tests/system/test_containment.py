"""Links in a cache or a run that lead out: nothing is written, deleted or read through them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogtune.commands import cache as caches
from cogtune.commands import train
from cogtune.commands.validate import validate
from cogtune.config.resolving import Resolved, resolve
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.store import Store
from cogtune.encoding import jobs
from cogtune.report.run import write_run_report
from cogtune.system.containment import leads_out, links_out
from cogtune.system.errors import CogtuneError
from cogtune.system.locks import exclusive_folder
from tests.support.runs_in_process import fill_here

Configured = Callable[..., RunConfig]


@pytest.fixture
def configured(clips: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Configured:
    """A configuration over a copy of the drawn clips; entries are made in this process."""
    data = shutil.copytree(clips, tmp_path / "data", ignore=shutil.ignore_patterns(".cogtune"))
    monkeypatch.setattr(jobs, "fill_cache", fill_here)

    def made(**flags: Any) -> RunConfig:
        return resolve(preset_name="cpu-lora-tiny", flags={"data": data, "model": "tiny:2b", **flags}).config

    return made


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of someone else, with files of names that cogtune itself uses."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("notes.txt", ".x.partial", "plan.json", "rank-0.json", "files.json", "job.log", ".lock"):
        (folder / name).write_text(f"of someone else: {name}")
    (folder / "ab").mkdir()
    (folder / "ab" / ".y.safetensors.1-00000000.partial").write_text("half")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


IN_A_CACHE = {
    ".": "",
    ".lock": ".lock",
    "files.json": "files.json",
    "job": "",
    "job/plan.json": "plan.json",
    "job/rank-0.json": "rank-0.json",
    "logs": "",
    "logs/job.log": "job.log",
    "latents": "",
    "latents/ab": "ab",
    "text": "",
    "image": "",
    "media": "",
    "logs/new.log": "not-there",  # would be made by a write through it
}


@pytest.mark.parametrize("place", IN_A_CACHE)
def test_a_datasets_cache_that_leads_out_is_refused(configured: Configured, victim: Path, place: str) -> None:
    config = configured()
    before, target = contents(victim), victim / IN_A_CACHE[place]
    planted = config.data / ".cogtune" / place
    link(planted, target)
    commands: tuple[Callable[[], object], ...] = (
        lambda: caches.fill(config),
        lambda: caches.look(config),
        lambda: caches.verify(config),
        lambda: caches.unused(config),
        lambda: validate(config),
        lambda: train.prepare_run(Resolved(config, {}), resume=None, overwrite=False, dry_run=True),
    )
    for command in commands:
        with pytest.raises(CogtuneError, match=r"is a link to .*elsewhere.*, outside of") as caught:
            command()
        assert str(planted) in caught.value.message
    assert contents(victim) == before
    if place == ".":
        assert f"--cache-dir {victim}" in caught.value.hint
        assert caches.fill(configured(cache_dir=victim)).done is not None  # asked for by its own name
        assert (victim / "notes.txt").read_text() == "of someone else: notes.txt"


def test_links_that_stay_inside_are_followed(configured: Configured, tmp_path: Path) -> None:
    config = configured()
    cache = config.data / ".cogtune"
    (cache / "large").mkdir(parents=True)
    (cache / "latents").symlink_to("large")
    done = caches.fill(config)
    assert done.done is not None
    assert len(list((cache / "large").glob("??/*.safetensors"))) == 6
    (tmp_path / "linked").symlink_to(config.data)
    assert caches.fill(configured(data=tmp_path / "linked")).done is None


def test_an_entry_that_is_a_link_or_a_pipe_is_none(configured: Configured, tmp_path: Path) -> None:
    store = Store(caches.fill(configured()).root)
    entries = list(store.entries())[:2]
    first, second = (store.path(entry.kind, entry.key) for entry in entries)
    shutil.move(first, tmp_path / "moved")
    first.symlink_to(tmp_path / "moved")
    second.unlink()
    os.mkfifo(second)
    assert not any(store.holds(entry.kind, entry.key) for entry in entries)
    before = (tmp_path / "moved").read_bytes()
    second.unlink()
    assert len(caches.fill(configured()).done or ()) == 2
    assert all(store.holds(entry.kind, entry.key) for entry in entries)
    assert not first.is_symlink()
    assert (tmp_path / "moved").read_bytes() == before


IN_A_RUN = {
    ".lock": ".lock",
    ".worker.lock": ".lock",
    "launch": "",
    "launch/plan.json": "plan.json",
    "launch-1/rank-0.json": "rank-0.json",
    "logs/launch.log": "job.log",
    "samples": "",
    "samples/step-000002": "",
    "samples/step-000002/samples.json": "plan.json",
    "run.yaml": "notes.txt",
    "checkpoint-1/state.json": "plan.json",
    "checkpoint-1/transformer/config.json": "plan.json",
    "checkpoint-1": "",
    "metrics.jsonl": "notes.txt",
}


@pytest.mark.parametrize("place", IN_A_RUN)
def test_a_runs_folder_that_leads_out_is_refused(tmp_path: Path, victim: Path, place: str) -> None:
    output, before = tmp_path / "out", contents(victim)
    link(output / place, victim / IN_A_RUN[place])
    if place != "run.yaml":
        (output / "run.yaml").write_text("model: tiny:2b\n")
    for command in (lambda: train.run_lock(output).__enter__(), lambda: write_run_report(output)):
        with pytest.raises(CogtuneError, match="is a link to"):
            command()
    assert contents(victim) == before


def test_every_link_is_named_at_once(tmp_path: Path, victim: Path) -> None:
    for name in ("latents", "text", ".lock"):
        link(tmp_path / "cache" / name, victim)
    with pytest.raises(CogtuneError) as caught, exclusive_folder(tmp_path / "cache"):
        pass
    assert caught.value.message == f"3 links lead out of {tmp_path / 'cache'}"
    assert [detail.partition(" ")[0].rpartition("/")[2] for detail in caught.value.details] == [
        ".lock",
        "latents",
        "text",
    ]


def test_a_lock_keeps_what_a_file_of_its_name_holds_and_is_no_pipe(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("kept")
    with exclusive_folder(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "kept"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(CogtuneError, match="is not a regular file"), exclusive_folder(tmp_path):
        pass


def test_what_leads_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "root-like").mkdir()
    (root / "samples").symlink_to(tmp_path / "root-like")
    (root / "logs").symlink_to("in")
    (root / "job").symlink_to("job")  # a loop leads nowhere
    (root / "mine").symlink_to(tmp_path)
    assert links_out(root) == [root / "samples"]
    assert leads_out(root / "mine", root)
    assert not leads_out(root, root)
    assert links_out(tmp_path / "nowhere") == []
