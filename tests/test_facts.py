"""What is remembered of files: kept as long as a file stands as it stood, and no longer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.data import facts as module
from cogtune.data.checks import Report, check_dataset
from cogtune.data.facts import Facts
from cogtune.data.frames import FrameSettings
from cogtune.data.inspection import Job, Seen, inspect
from cogtune.data.sources import read_dataset
from cogtune.data.stamp import FileChanged, stamp_of
from cogtune.data.video import MissingVideo, NotAVideo, probe
from cogtune.errors import CogtuneError
from cogtune.geometry import Size


@pytest.fixture
def clip(clips: Path) -> Path:
    return clips / (clips / "videos.txt").read_text().splitlines()[0]


def test_facts_outlive_the_process(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Facts(tmp_path / "files.json")
    told = facts.digest(clip), facts.probe(clip)
    assert told[1] == probe(clip)
    facts.save()

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was opened again")

    monkeypatch.setattr(module, "digest_file", refuse)
    monkeypatch.setattr(module, "probe", refuse)
    again = Facts(tmp_path / "files.json")
    assert (again.digest(clip), again.probe(clip)) == told
    written = (tmp_path / "files.json").stat().st_mtime_ns
    again.save()
    assert (tmp_path / "files.json").stat().st_mtime_ns == written  # nothing was learned


def test_another_size_or_time_is_another_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    facts = Facts(tmp_path / "files.json")
    path.write_bytes(b"one")
    os.utime(path, ns=(0, 10))
    first = facts.digest(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 10))
    assert facts.digest(path) == first  # nothing tells the two apart
    os.utime(path, ns=(0, 11))
    second = facts.digest(path)
    path.write_bytes(b"three")
    os.utime(path, ns=(0, 11))
    assert len({first, second, facts.digest(path)}) == 3


def test_an_old_stamp_takes_its_other_facts_along(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    facts = Facts(tmp_path / "files.json")
    facts.digest(path)
    facts.learn(path, "shape", [1, 2], (3, 12))
    assert facts.known(path, "digest", (3, 12)) is None
    assert facts.known(path, "shape", (3, 12)) == [1, 2]


def test_a_failure_is_not_remembered(tmp_path: Path) -> None:
    facts = Facts(tmp_path / "files.json")
    path = tmp_path / "a.mp4"
    with pytest.raises(MissingVideo):
        facts.probe(path)
    path.write_bytes(b"no film at all" * 100)
    with pytest.raises(NotAVideo):
        facts.probe(path)
    with pytest.raises(CogtuneError, match="cannot read"):
        facts.digest(tmp_path / "b")


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 3}', '{"CLIP": {"stamp": [1, 2], "probe": 3}}'])
def test_a_damaged_memory_only_costs_time(content: str, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "files.json").write_text(content.replace("CLIP", str(clip)))
    assert Facts(tmp_path / "files.json").probe(clip) == probe(clip)


def test_what_another_version_told_is_found_out_again(clip: Path, tmp_path: Path) -> None:
    facts = Facts(tmp_path / "files.json")
    more = {"colour": "blue", **asdict(probe(clip))}
    less = dict(list(asdict(probe(clip)).items())[:-1])
    for told in (more, less):
        facts.learn(clip, "probe", told, facts.stamp(clip))
        assert facts.known_probe(clip, facts.stamp(clip)) is None
        assert facts.probe(clip) == probe(clip)


def test_a_clip_that_was_in_order_and_has_not_changed_is_not_opened_again(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(clips, tmp_path / "data", ignore=shutil.ignore_patterns(".cogtune")))
    names = (data / "videos.txt").read_text().splitlines()
    (data / names[5]).write_bytes(b"no film at all" * 100)
    Image.new("RGB", (96, 64)).save(data / "first.png")
    (data / "images.txt").write_text("first.png\n" * 6)
    settings = FrameSettings(size=Size(9, 64, 96), fps=8.0)
    opened: list[str] = []

    def spy(jobs: Iterable[Job], **options: Any) -> Iterator[tuple[int, Seen]]:
        listed = list(jobs)
        opened.extend(job.video.name for job in listed)
        yield from inspect(listed, **options)

    monkeypatch.setattr("cogtune.data.checks.inspect", spy)

    def look(**options: Any) -> tuple[Report, list[str]]:
        opened.clear()
        facts = Facts(tmp_path / "files.json")
        report = check_dataset(read_dataset(data), settings, facts=facts, workers=1, **options)
        facts.save()
        return report, sorted(opened)

    everything = sorted(Path(name).name for name in names)
    first, looked = look()
    assert looked == everything
    again, looked = look()
    assert looked == [Path(names[5]).name]  # what is wrong is told anew each time
    assert again == first
    assert look(full=True)[1] == everything
    os.utime(data / names[0], ns=(1, 1))
    assert look()[1] == sorted(Path(names[place]).name for place in (0, 5))
    os.utime(data / "first.png", ns=(1, 1))
    assert look()[1] == everything


def test_a_file_that_changes_while_it_is_looked_at_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    facts = Facts(None)

    def find(path: Path) -> str:
        path.write_bytes(b"three")
        return "of the first bytes"

    stamp = facts.stamp(path)
    with pytest.raises(FileChanged, match="changed while it was being read"):
        facts.remembered(path, "digest", find)
    assert facts.known(path, "digest", stamp) is None


def test_who_reads_a_file_later_knows_how_it_stood_when_its_digest_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    facts = Facts(None)
    facts.digest(path)
    assert facts.current(path) == stamp_of(path)
    path.write_bytes(b"three")
    with pytest.raises(FileChanged):
        facts.current(path)
