"""What validate finds broken can be left out by name, and nothing is left out that was not meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from cogtune.cli import main
from cogtune.commands import validate
from cogtune.config.resolving import resolve
from cogtune.data.cache.index import Index
from cogtune.data.findings import Finding, finding
from cogtune.data.sources import Dataset, Sample, read_dataset
from cogtune.data.validation.quarantine import read_quarantine, without_quarantined, write_quarantine
from cogtune.data.video.clips import write_video
from cogtune.encoding import jobs
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.tokens import token_counter
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.runs_in_process import fill_here, plan_for

PLAIN = ["a", "videos/b c", "ünïcode/猫", "repeat#2"]
AWKWARD = ["#looks like a comment", ' "in quotes"', "two\nlines", "behind  # it", '"quoted', "end  # "]


def dataset(*ids: str, findings: tuple[Finding, ...] = ()) -> Dataset:
    return Dataset(Path("data"), "lists", tuple(Sample(one, Path("x.mp4"), "A caption.") for one in ids), findings)


def test_every_id_comes_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "new" / "quarantine.txt"
    ids = [*PLAIN, *AWKWARD]
    errors = tuple(finding("too-short", one, "is too short") for one in ids)
    assert write_quarantine(file, dataset(*ids), errors) == len(ids)
    assert list(read_quarantine(file)) == ids
    assert "videos/b c  # too-short\n" in file.read_text()


def test_a_file_written_by_hand_is_read(tmp_path: Path) -> None:
    file = tmp_path / "q.txt"
    file.write_bytes("\ufeff# mine\r\n\r\nvideos/1\r\n  videos/2  \r\nvideos/3  # too dark\r\nvideos/1\r\n".encode())
    assert list(read_quarantine(file)) == ["videos/1", "videos/2", "videos/3"]


def test_errors_are_listed_and_with_strict_warnings_too(tmp_path: Path) -> None:
    file = tmp_path / "q.txt"
    findings = (
        finding("too-short", "a", "x"),
        finding("damaged-video", "a", "x"),
        finding("outside-folder", "videos.txt:4", "x"),
        finding("line-counts", "videos.txt:7", "x"),  # not about one row: nothing can be paired
        finding("model-size", "9x60x96", "x"),
        finding("upscaled", "b", "x"),
        finding("same-caption", "c", "x"),
    )
    assert write_quarantine(file, dataset("a", "b", "c"), findings) == 2
    assert file.read_text().splitlines()[1:] == ["a  # too-short, damaged-video", "videos.txt:4  # outside-folder"]
    assert write_quarantine(file, dataset("a", "b", "c"), findings, strict=True) == 3
    assert list(read_quarantine(file)) == ["a", "videos.txt:4", "b"]


def test_what_is_named_goes_with_what_was_found_about_it(tmp_path: Path) -> None:
    file = tmp_path / "q.txt"
    file.write_text("a\nvideos.txt:4\ngone\nb#2\n")
    findings = (finding("missing-video", "a", "x"), finding("bad-path", "videos.txt:4", "x"))
    rest = finding("other-layout", "data", "x")
    remaining = without_quarantined(dataset("a", "b", "c", findings=(*findings, rest)), file)
    assert [sample.id for sample in remaining.dataset.samples] == ["b", "c"]
    assert remaining.dataset.findings == (rest,)
    assert (remaining.left_out, remaining.unknown) == (2, ("gone", "b#2"))


def test_what_beside_clips_cannot_be_used_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ("good", "latin", "link"):
        (root / f"{name}.txt").write_text("A caption.")
    (root / "latin.txt").write_bytes(b"na\xefve")
    (root / "good.mp4").touch()
    (root / "latin.mp4").touch()
    (root / "link.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    Path(f"{root}/\udce9.mp4").touch()
    found = read_dataset(root)
    assert write_quarantine(tmp_path / "bad.txt", found, found.findings) == 3
    remaining = without_quarantined(found, tmp_path / "bad.txt")
    assert [sample.id for sample in remaining.dataset.samples] == ["good"]
    assert not remaining.dataset.findings
    assert (remaining.left_out, remaining.unknown) == (3, ())


def test_a_file_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "q.txt"
    with pytest.raises(CogtuneError, match=r"cannot read .*q\.txt"):
        without_quarantined(dataset("a"), file)
    file.write_bytes(b"a\nb\xff\n")
    with pytest.raises(UsageError, match="line 2 is not UTF-8"):
        without_quarantined(dataset("a"), file)
    file.write_text("a\nb\n")
    with pytest.raises(UsageError, match="leaves out all 2 samples"):
        without_quarantined(dataset("a", "b"), file)


@pytest.fixture
def half_broken(tmp_path: Path) -> Path:
    """Four rows: a sound clip, one cut short, a path that leaves, a sound clip."""
    root = tmp_path / "data"
    for name, grey in (("a", 0), ("b", 90), ("d", 180)):
        write_video(root / f"{name}.mp4", np.full((12, 64, 96, 3), grey, np.uint8), 8)
    (root / "b.mp4").write_bytes((root / "b.mp4").read_bytes()[:-200])
    (root / "prompts.txt").write_text("A frame.\nB frame.\nC frame.\nD frame.\n")
    (root / "videos.txt").write_text("a.mp4\nb.mp4\n../c.mp4\nd.mp4\n")
    return root


def test_what_validate_writes_train_accepts(
    half_broken: Path, tmp_path: Path, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file, spec = tmp_path / "q.txt", read_spec(tiny("2b"))
    config = resolve(preset_name="cpu-lora-tiny", flags={"data": half_broken}).config
    report = validate.validate(config, quarantine=file)
    assert report.counts["error"] == 2
    assert list(read_quarantine(file)) == ["videos.txt:3", "b"]
    assert f"wrote 2 samples to leave out to {file}" in capsys.readouterr().err
    with pytest.raises(CogtuneError, match="has errors and cannot be used for training"):
        validate.checked_dataset(config, spec)
    file.write_text(file.read_text() + "gone\n")
    kept = validate.checked_dataset(config.model_copy(update={"quarantine": file}), spec)
    assert [sample.id for sample in kept.samples] == ["a", "d"]
    told = capsys.readouterr().err
    assert f"2 samples are left out because of {file}" in told
    assert f"lists samples that are not in {half_broken}: gone" in told


def test_the_file_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(flags={"quarantine": "q.txt"}).config
    assert config.quarantine == Path("q.txt")
    assert config.with_absolute_paths().quarantine == tmp_path / "q.txt"


# ---------------------------------------------------------------------------------------------------- tokens


def test_tokens_are_those_that_the_model_reads(tiny: Callable[[str], Path]) -> None:
    captions = ["", "A cat.", "a  cat,\tasleep on “the” mat…", "ﬁne \uff12 naïve 猫 🐈", "x" * 300, "word " * 50]
    tokenizer = AutoTokenizer.from_pretrained(tiny("2b") / "tokenizer")
    count = token_counter("tiny:2b")
    assert count is not None
    assert count(captions) == [len(ids) for ids in tokenizer(captions)["input_ids"]]
    assert token_counter(str(tiny("2b"))) is not None
    with_token = token_counter("tiny:2b", "BW_STYLE")
    assert with_token is not None
    assert with_token(["A cat."]) == [len(tokenizer("BW_STYLE A cat.")["input_ids"])]


def test_a_tokenizer_that_is_not_here_is_not_fetched() -> None:
    assert token_counter("5b") is None
    assert token_counter("someone/model") is None
    assert token_counter("no such thing") is None


def test_validate_counts_by_the_models_tokenizer(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((12, 64, 96, 3), np.uint8), 8)
    (tmp_path / "a.txt").write_text("xyzzy " * 100)
    (found,) = [
        one
        for one in validate.validate(resolve(preset_name="cpu-lora-tiny", flags={"data": tmp_path}).config).findings
        if one.code == "long-caption"
    ]
    count = len(AutoTokenizer.from_pretrained(tiny("2b") / "tokenizer")(("xyzzy " * 100).strip())["input_ids"])
    assert count > 226 > 135  # 135 is what its words would have been taken for
    assert f"100 words, {count} tokens;" in found.message
    assert read_dataset(tmp_path).samples[0].id == "a"


def test_the_command_lists_warnings_too_when_it_is_strict(half_broken: Path, tmp_path: Path) -> None:
    words = ["dataset", "validate", str(half_broken), "--preset", "cpu-lora-tiny", "--full", "--strict"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--size", "9x128x192", "--quarantine", str(tmp_path / "q.txt")])
    assert ended.value.code == 1
    assert (tmp_path / "q.txt").read_text().splitlines()[1:] == [
        "videos.txt:3  # outside-folder",
        "b  # cut-short",
        "a  # upscaled",
        "d  # upscaled",
    ]


def test_a_run_is_of_the_samples_that_remain(
    half_broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    file = tmp_path / "q.txt"
    file.write_text("videos.txt:3\nb\n")
    plan = plan_for(half_broken, tmp_path / "out", quarantine=file)
    assert plan.samples == 2
    assert [row.id for row in Index.read(plan.index).rows] == ["a", "d"]
    fewer = tmp_path / "fewer.txt"
    fewer.write_text("videos.txt:3\nb\nd\n")
    other = plan_for(half_broken, tmp_path / "other", quarantine=fewer)
    assert other.resume_fingerprint != plan.resume_fingerprint


def test_a_file_in_utf16_is_read_by_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes("日落\nb\n".encode("utf-16"))
    assert list(read_quarantine(path)) == ["日落", "b"]
    path.write_bytes("a\nb\n".encode("utf-16-le"))
    with pytest.raises(UsageError, match=r"bad\.txt looks like UTF-16"):
        read_quarantine(path)
