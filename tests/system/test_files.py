"""Files are whole or not there, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtune.system import digests, files, folders, json_files
from cogtune.system.errors import CogtuneError, did_you_mean


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    json_files.write_json(target, {"old": 1})

    def half(aside: Path) -> None:
        aside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CogtuneError, match="No space left") as caught:
        files.write_atomic(target, half)
    assert "free some space" in caught.value.hint
    assert json_files.read_json(target) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with folders.written_folder(target) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "x").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with folders.written_folder(target) as aside:
        (aside / "x").write_text("old")

    def fail() -> None:
        with folders.written_folder(target) as aside:
            (aside / "x").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "x").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\nfrom cogtune.system import files\n"
        "def slow(aside):\n    aside.write_text('half'); print('here', flush=True); time.sleep(60)\n"
        "files.write_atomic(pathlib.Path(sys.argv[1]), slow)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "f")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    left = names(tmp_path)
    assert "f" not in left
    assert len(left) == 1
    folders.remove_partials(tmp_path)
    assert names(tmp_path) == []


def test_digests_tell_values_apart_and_do_not_mind_the_order_of_keys() -> None:
    assert digests.digest({"a": 1, "b": [1, 2]}) == digests.digest({"b": [1, 2], "a": 1})
    assert digests.digest({"a": 1}) != digests.digest({"a": "1"})
    assert digests.digest([["ab"], "c"]) != digests.digest([["a"], "bc"])


def test_what_is_not_json_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CogtuneError, match=r"x\.json is not valid JSON"):
        json_files.read_json(tmp_path / "x.json")


def test_the_nearest_word_is_offered_only_when_it_is_near() -> None:
    assert did_you_mean("rnak", ["rank", "alpha"]) == "; did you mean 'rank'?"
    assert did_you_mean("zzz", ["rank", "alpha"]) == ""


def test_a_private_file_of_a_library_becomes_an_ordinary_one(tmp_path: Path) -> None:
    def private(aside: Path) -> None:
        aside.write_text("x")
        aside.chmod(0o600)

    files.write_atomic(tmp_path / "a", private)
    with folders.written_folder(tmp_path / "folder") as folder:
        private(folder / "b")
    (tmp_path / "c").write_text("as any program writes it")
    ordinary = (tmp_path / "c").stat().st_mode
    assert (tmp_path / "a").stat().st_mode == ordinary
    assert (tmp_path / "folder" / "b").stat().st_mode == ordinary


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", "No space left on device"),
        ("Error while serializing: I/O error: File too large (os error 27)", "File too large"),
        ("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598", "No space left on device"),
    ],
)
def test_a_librarys_own_word_for_a_failed_write_is_understood(tmp_path: Path, told: str, reason: str) -> None:
    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise RuntimeError(told)

    with pytest.raises(CogtuneError, match=f"cannot write .*: {reason}") as caught:
        files.write_atomic(tmp_path / "a", fail)
    assert caught.value.hint
    assert names(tmp_path) == []


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def fail(_aside: Path) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        files.write_atomic(tmp_path / "a", fail)


@pytest.fixture(params=["in one step", "in two steps"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which a folder takes another's place: not every file system can exchange two names."""
    if request.param == "in two steps":
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)


def put(target: Path, text: str, warn: Callable[[str], object] | None = None) -> None:
    with folders.written_folder(target, warn) as aside:
        (aside / "x").write_text(text)


@pytest.mark.usefixtures("exchange")
def test_an_old_folder_that_cannot_be_deleted_is_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, said = tmp_path / "out", list[str]()
    put(target, "old")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        put(target, "new", said.append)
    assert (target / "x").read_text() == "new"
    left = [name for name in names(tmp_path) if name != "out"]
    assert said == [f"cannot delete {tmp_path / left[0]} (Operation not permitted); it is no longer needed"]
    assert (tmp_path / left[0] / "x").read_text() == "old"
    put(target, "newer", said.append)  # what is left stands in nobody's way, and goes when it can
    assert (names(tmp_path), len(said)) == (["out"], 1)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "out", Path.rename
    put(target, "old")
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)

    def refuse_the_second(path: Path, to: Path) -> Path:
        if path.name == ".out.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse_the_second)
        with pytest.raises(CogtuneError, match="Input/output error"):
            put(target, "new")
    assert (target / "x").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("look", [folders.remove_partials, lambda folder: folders.partial_folder(folder / "out")])
def test_killed_between_two_renames_the_old_folder_comes_back(tmp_path: Path, look: Callable[[Path], object]) -> None:
    put(tmp_path / "out", "old")
    (tmp_path / "out").rename(folders._replaced(tmp_path / "out"))
    look(tmp_path)
    assert (tmp_path / "out" / "x").read_text() == "old"


@pytest.mark.parametrize("how", [["-t", "tmpfs", "tmpfs"], ["--bind", "."]])
def test_a_mount_point_is_refused_before_anything_is_written(how: list[str], tmp_path: Path) -> None:
    target = tmp_path / "out put"
    target.mkdir()
    (tmp_path / "from").mkdir()
    words = [str(tmp_path / "from") if word == "." else word for word in how]
    if subprocess.run(["mount", *words, target], capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root alone")
    try:
        with pytest.raises(CogtuneError) as caught:
            put(target, "new")
    finally:
        subprocess.run(["umount", target], check=True)
    assert caught.value.message == f"{target} is a mount point, which no other folder can take the place of"
    assert caught.value.hint == f"choose a folder inside it, such as {target / 'merged'}"
    assert names(tmp_path) == ["from", "out put"]


def test_what_is_sealed_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    path, value = tmp_path / "x.json", {"a": [1, 2.5, "é"], "b": {"2": None, "10": True}, "c": (1, 2)}
    json_files.write_sealed(path, value)
    wanted = {**value, "c": [1, 2]}
    assert json_files.read_sealed(path) == wanted
    whole, chance = path.read_bytes(), random.Random(4)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 8])):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        path.write_bytes(damaged if chance.random() < 0.8 else damaged[: chance.randrange(len(whole))])
        try:
            assert json_files.read_sealed(path) == wanted
        except CogtuneError as error:
            refused += 1
            assert str(path) in error.message  # noqa: PT017 (it may also be harmless)
    assert refused > 200


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"\xff", "is not valid JSON"),
        (b"", "is not valid JSON"),
    ],
)
def test_json_that_is_none_is_told(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CogtuneError, match=why) as caught:
        json_files.read_json(tmp_path / "x.json")
    assert str(tmp_path / "x.json") in caught.value.message


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    (tmp_path / "folder").mkdir()
    for path, why in ((tmp_path / "x.json", "is not an ordinary file"), (tmp_path / "folder", "is a folder")):
        with pytest.raises(CogtuneError, match=f"cannot read .*: {why}"):
            json_files.read_json(path)


def test_a_fingerprint_stands_for_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_PIECE", 100)
    path, data = tmp_path / "x", bytearray(random.Random(1).randbytes(450))
    found = set()
    for place in (None, 0, 99, 100, 449):
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        found.add(digests.fingerprint_file(path))
        assert digests.fingerprint_file(path) in found
    path.write_bytes(data[:-1])
    found.add(digests.fingerprint_file(path))
    path.write_bytes(data[100:200] + data[:100] + data[200:])
    found.add(digests.fingerprint_file(path))
    path.write_bytes(b"")
    found.add(digests.fingerprint_file(path))
    assert len(found) == 8
