"""Files are whole or not there, whatever happens on the way."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
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
