"""``nano:NAME`` as a model: made once from the parts of the package, and used like any other.

The transformers are new, so that the tests need no trained ones; ``tests/modeling/test_nano_parts.py`` is about those.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtune.data.video.clips import probe
from cogtune.encoding import jobs
from cogtune.modeling import nano as making
from cogtune.modeling.nano import write_nano
from cogtune.models import nano_models
from cogtune.models.locate import locate, spec_of
from cogtune.models.nano_models import nano_model
from cogtune.models.tokens import token_counter
from cogtune.models.variants import NANO_VARIANTS, VARIANTS
from cogtune.run import launch
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.forked_workers import start_process
from tests.support.in_process import run
from tests.support.runs_in_process import fill_here, start_here
from tests.support.waiting import wait_until


@pytest.mark.parametrize("name", NANO_VARIANTS)
def test_configs_are_those_of_a_small_model_like_the_published_one(name: str, nano: Callable[[str], Path]) -> None:
    spec = spec_of(f"nano:{name}")
    assert spec.variant is VARIANTS[name]
    assert (str(spec.native), spec.max_text_seq_length, spec.num_layers) == ("17x64x96", 48, 5)
    assert spec.size_problems(spec.native) == spec.size_advice(spec.native) == []
    assert nano(name) == nano(name.upper())


def test_captions_are_counted_by_its_own_tokenizer(nano: Callable[[str], Path]) -> None:
    count = token_counter("nano:5b")
    assert count is not None
    assert count(["a pink heart", ""]) == [4, 1]
    assert token_counter("tiny:5b")(["a pink heart"]) != [4]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("reference", "told", "names"),
    [
        ("nano:5b-i2w", "unknown nano model '5b-i2w'; did you mean '5b-i2v'?", NANO_VARIANTS),
        ("nano:1.5-5b", "unknown nano model '1.5-5b'", NANO_VARIANTS),
        ("nano:", "unknown nano model ''", NANO_VARIANTS),
        ("tiny:2c", "unknown tiny model '2c'", tuple(VARIANTS)),
    ],
)
def test_a_built_in_model_that_does_not_exist(reference: str, told: str, names: tuple[str, ...]) -> None:
    kind = reference.partition(":")[0]
    for ask in (locate, spec_of, token_counter):
        with pytest.raises(UsageError) as caught:
            ask(reference)
        assert caught.value.message.startswith(told)
        assert caught.value.hint == f"use one of {', '.join(f'{kind}:{name}' for name in names)}"


def test_a_local_folder_of_that_name_comes_first(
    tmp_path: Path, nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(nano("2b"), tmp_path / "nano:5b")
    assert locate("nano:5b") == tmp_path / "nano:5b"
    assert spec_of("nano:5b").variant.name == "2b"


def test_it_is_made_once_for_the_parts_that_there_are(
    tmp_path: Path, untrained_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COGTUNE_HOME", str(tmp_path / "home"))
    parts = tmp_path / "parts"
    shutil.copytree(untrained_parts, parts)
    monkeypatch.setattr(nano_models, "NANO_PARTS", parts)
    folder = nano_model("5B")
    assert folder.parent == tmp_path / "home" / "nano"
    assert folder.name.startswith("5b-")
    monkeypatch.setattr(making, "write_nano", None)
    assert nano_model("5b") == folder
    with pytest.raises(TypeError):
        nano_model("2b")
    record = parts / "records" / "transformer-5b.json"
    before = record.read_text()
    facts = json.loads(before)
    facts["files"]["config.json"] = "0"
    record.write_text(json.dumps(facts))
    with pytest.raises(TypeError):  # other weights: another folder, to be written
        nano_model("5b")
    record.write_text(before)
    assert nano_model("5b") == folder
    assert list(folder.parent.iterdir()) == [folder]


def test_a_package_without_the_transformer_says_so(
    tmp_path: Path, untrained_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COGTUNE_HOME", str(tmp_path / "home"))
    shutil.copytree(untrained_parts, tmp_path / "parts", ignore=shutil.ignore_patterns("transformer-5b*"))
    monkeypatch.setattr(nano_models, "NANO_PARTS", tmp_path / "parts")
    with pytest.raises(CogtuneError, match="nano:5b is not part of this version"):
        locate("nano:5b")
    assert not (tmp_path / "home").exists()
    assert nano_model("2b").is_dir()


def test_files_of_a_read_only_package_can_be_replaced_and_deleted(tmp_path: Path, untrained_parts: Path) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(untrained_parts, parts)
    for path in parts.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder = write_nano("2b", parts, tmp_path / "2b")
    assert all(path.stat().st_mode & 0o200 for path in folder.rglob("*"))
    for path in parts.rglob("*"):
        path.chmod(0o755)


def test_one_that_is_there_is_found_without_torch(untrained_parts: Path, nano: Callable[[str], Path]) -> None:
    nano("5b")
    program = f"""
import pathlib, sys
from cogtune.models import nano_models
from cogtune.models.locate import spec_of
nano_models.NANO_PARTS = pathlib.Path({str(untrained_parts)!r})
spec_of("nano:5b")
print("torch" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def ask(folder: Path, parts: Path, number: int) -> None:
    nano_models.NANO_PARTS = parts
    (folder / f"ready{number}").touch()
    wait_until(lambda: len(list(folder.glob("ready*"))) == 2)
    (folder / f"path{number}").write_text(str(nano_model("5b")))


@pytest.mark.slow
def test_two_processes_may_ask_at_once(tmp_path: Path, untrained_parts: Path) -> None:
    home = {"COGTUNE_HOME": str(tmp_path / "home")}
    log = tmp_path / "log"
    both = [start_process(ask, tmp_path, untrained_parts, number, log=log, variables=home) for number in range(2)]
    for process in both:
        process.join(600)
    assert [process.exitcode for process in both] == [0, 0], log.read_text()
    (path,) = {path.read_text() for path in tmp_path.glob("path*")}
    assert list((tmp_path / "home" / "nano").iterdir()) == [Path(path)]
    again = write_nano("5b", untrained_parts, tmp_path / "again")
    assert contents(Path(path)) == contents(again)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("nano")
def test_it_is_trained_and_sampled_by_its_name(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.setattr(launch, "start", start_here)
    words = [
        "train",
        "--preset",
        "cpu-lora-tiny",
        "--model",
        "nano:5b",
        "--size",
        "17x64x96",
        "--data",
        clips,
        "--cache-dir",
        tmp_path / "cache",
    ]
    run(capsys, *words, "--steps", 1, "--batch-size", 2, "--eval-every", 0)
    assert json.loads((tmp_path / "out" / "launch" / "plan.json").read_text())["spec"]["max_text_seq_length"] == 48
    run(capsys, "infer", "--lora", "out", "--prompt", "A red disc rises.", "--steps", 1, "--output", "lora.mp4")
    run(capsys, "infer", "--model", "nano:5b", "--prompt", "A red disc.", "--steps", 1, "--output", "base.mp4")
    for name in ("lora.mp4", "base.mp4"):
        info = probe(tmp_path / name)
        assert (info.num_frames, info.height, info.width, info.fps) == (17, 64, 96, 8.0)
