"""Sampling: what is asked for against what the run says, and what is refused before a model is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import CogVideoXTransformer3DModel

from cogtune import generate as module
from cogtune.errors import CogtuneError, UsageError
from cogtune.generate import Request, fill_in, generate
from cogtune.modeling.adapters import add_lora, save_lora
from cogtune.models import LORA_WEIGHTS_NAME, fingerprint
from cogtune.training.metrics import read_metrics


@pytest.fixture
def lora(tmp_path: Path, tiny: Callable[[str], Path]) -> Callable[..., Path]:
    """A LoRA file that says it was trained on tiny:2b."""

    def made(**facts: Any) -> Path:
        base = tiny("2b")
        told = {
            "base_model": "tiny:2b",
            "model_path": str(base),
            "prompt": "a red disc",
            "size": "9x64x96",
            "identity": {"model": fingerprint(base, "transformer")},
        }
        path = tmp_path / "lora.safetensors"
        transformer = CogVideoXTransformer3DModel.from_pretrained(base / "transformer")
        add_lora(transformer, rank=2, alpha=2, target_modules=["to_q"], seed=1)
        save_lora(path, transformer, told | facts)
        return path

    return made


def zero_run(output: Path) -> Path:
    """A run with one checkpoint whose weights are in shards; the checkpoint."""
    checkpoint = output / "checkpoint-2"
    (checkpoint / "pytorch_model").mkdir(parents=True)
    (checkpoint / "latest").write_text("pytorch_model")
    (checkpoint / "state.json").write_text("{}")
    return checkpoint


def test_an_empty_prompt_is_a_prompt(lora: Callable[..., Path]) -> None:
    assert fill_in(Request(lora=lora(), prompt="")).prompt == ""
    assert fill_in(Request(lora=lora())).prompt == "a red disc"
    with pytest.raises(UsageError) as caught:
        fill_in(Request(lora=lora(prompt=None)))
    assert caught.value.details == ("--prompt: say what to show",)


def test_a_model_with_a_damaged_file_is_told(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("2b"), folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CogtuneError, match="cannot be loaded") as caught:
        generate(Request(model=str(folder), prompt="a boat"), tmp_path / "boat.mp4")
    assert str(folder) in caught.value.message
    assert "damaged" in caught.value.hint


def test_a_part_of_a_model_is_told_for_what_it_is(tmp_path: Path, lora: Callable[..., Path]) -> None:
    for name, told in ((LORA_WEIGHTS_NAME, "it is a LoRA: give it as --lora"), ("config.json", "a transformer alone")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        with pytest.raises(CogtuneError, match="is not a diffusers checkpoint") as caught:
            fill_in(Request(model=str(tmp_path / name), prompt="a boat"))
        assert told in caught.value.hint


def test_a_lora_on_another_base_is_told_and_goes_on(
    lora: Callable[..., Path], tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("5b")  # made now, since the making writes to stderr
    capsys.readouterr()
    fill_in(Request(lora=lora()))
    fill_in(Request(lora=lora(), model=str(tiny("2b"))))
    fill_in(Request(lora=lora(identity=None), model="tiny:5b"))
    assert capsys.readouterr().err == ""
    recipe = fill_in(Request(lora=lora(), model="tiny:5b"))
    told = capsys.readouterr().err
    assert recipe.base == tiny("5b")
    assert "warning: " in told
    assert "tiny:2b" in told
    assert str(tiny("5b")) in told


@pytest.mark.parametrize("what", ["run", "checkpoint"])
@pytest.mark.parametrize("option", ["model", "lora"])
def test_weights_in_shards_have_to_be_merged_first(tmp_path: Path, what: str, option: str) -> None:
    checkpoint = zero_run(tmp_path / "a run")
    given = checkpoint if what == "checkpoint" else checkpoint.parent
    request = Request(model=str(given)) if option == "model" else Request(lora=given)
    with pytest.raises(UsageError) as caught:
        fill_in(request)
    assert f"needs `cogtune merge-zero '{checkpoint}'` first" in caught.value.message


def test_a_zero_checkpoint_with_its_lora_needs_no_merging(tmp_path: Path, lora: Callable[..., Path]) -> None:
    checkpoint = zero_run(tmp_path / "run")
    lora().rename(checkpoint / LORA_WEIGHTS_NAME)
    assert fill_in(Request(lora=tmp_path / "run")).lora.path == checkpoint / LORA_WEIGHTS_NAME


def test_an_output_that_cannot_be_written_is_told_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr(module, "fill_in", refuse)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for output, why in (
        (tmp_path / "folder.mp4", "a folder has that name"),
        (tmp_path / "file" / "x.mp4", f"cannot write {tmp_path}/file/x.mp4: "),
        (tmp_path / "file" / "deeper" / "x.mp4", f"cannot write {tmp_path}/file/deeper/x.mp4: "),
    ):
        with pytest.raises(CogtuneError, match=why):
            generate(Request(), output)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(CogtuneError, match=f"{tmp_path} is not writable"):
        generate(Request(), tmp_path / "new" / "x.mp4")


def test_lines_that_say_no_step_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 0.5}\n'
    file.write_bytes(good + b'3\n[]\nnull\n{}\n{"step": "2"}\n{"step": true}\n\xff\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 0.5}]
