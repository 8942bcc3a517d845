"""Sampling: what is asked for against what the run says, and what is refused before a model is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import save_file

from cogtune.commands import infer as module
from cogtune.commands.infer import InferRequest, fill_in, generate
from cogtune.modeling.adapters import add_lora, lora_state, save_lora
from cogtune.models.checkpoint_configs import fingerprint
from cogtune.models.geometry import Size
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.metrics import read_metrics
from cogtune.system.errors import CogtuneError, UsageError


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
    assert fill_in(InferRequest(lora=lora(), prompt="")).prompt == ""
    assert fill_in(InferRequest(lora=lora())).prompt == "a red disc"
    with pytest.raises(UsageError) as caught:
        fill_in(InferRequest(lora=lora(prompt=None)))
    assert caught.value.details == ("--prompt is required",)


def test_a_model_with_a_damaged_file_is_told(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("2b"), folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CogtuneError, match="cannot load") as caught:
        generate(InferRequest(model=str(folder), prompt="a boat"), tmp_path / "boat.mp4")
    assert str(folder) in caught.value.message
    assert "damaged" in caught.value.hint


def test_a_part_of_a_model_is_told_for_what_it_is(tmp_path: Path, lora: Callable[..., Path]) -> None:
    for name, told in (
        (LORA_WEIGHTS_NAME, "it is a LoRA; pass it as --lora"),
        ("config.json", "it is only a transformer"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        with pytest.raises(CogtuneError, match="is not a diffusers checkpoint") as caught:
            fill_in(InferRequest(model=str(tmp_path / name), prompt="a boat"))
        assert told in caught.value.hint


def test_a_lora_on_another_base_is_told_and_goes_on(
    lora: Callable[..., Path], tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("5b")  # made now, since the making writes to stderr
    capsys.readouterr()
    fill_in(InferRequest(lora=lora()))
    fill_in(InferRequest(lora=lora(), model=str(tiny("2b"))))
    fill_in(InferRequest(lora=lora(identity=None), model="tiny:5b"))
    assert "was trained on" not in capsys.readouterr().err
    recipe = fill_in(InferRequest(lora=lora(), model="tiny:5b"))
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
    request = InferRequest(model=str(given)) if option == "model" else InferRequest(lora=given)
    with pytest.raises(UsageError) as caught:
        fill_in(request)
    assert f"needs `cogtune merge-zero '{checkpoint}'` first" in caught.value.message


def test_a_zero_checkpoint_with_its_lora_needs_no_merging(tmp_path: Path, lora: Callable[..., Path]) -> None:
    checkpoint = zero_run(tmp_path / "run")
    lora().rename(checkpoint / LORA_WEIGHTS_NAME)
    assert fill_in(InferRequest(lora=tmp_path / "run")).lora.path == checkpoint / LORA_WEIGHTS_NAME


def test_an_output_that_cannot_be_written_is_told_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr(module, "fill_in", refuse)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for output, why in (
        (tmp_path / "folder.mp4", "it is a folder"),
        (tmp_path / "file" / "x.mp4", f"cannot write {tmp_path}/file/x.mp4: "),
        (tmp_path / "file" / "deeper" / "x.mp4", f"cannot write {tmp_path}/file/deeper/x.mp4: "),
    ):
        with pytest.raises(CogtuneError, match=why):
            generate(InferRequest(), output)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(CogtuneError, match=f"{tmp_path} is not writable"):
        generate(InferRequest(), tmp_path / "new" / "x.mp4")


def test_lines_that_say_no_step_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 0.5}\n'
    file.write_bytes(good + b'3\n[]\nnull\n{}\n{"step": "2"}\n{"step": true}\n\xff\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 0.5}]


# ---------------------------------------------------------------------------------------- what is sampled, in files


def video(output: Path, **asked: Any) -> bytes:
    """The bytes of a video of two steps on tiny:2b."""
    generate(InferRequest(model="tiny:2b", prompt="a red disc", steps=2, **asked), output)
    return output.read_bytes()


@pytest.fixture
def foreign(tmp_path: Path, tiny: Callable[[str], Path]) -> Callable[[str], Path]:
    """One adapter of rank 8 and alpha 4 as several programs write it."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny("2b") / "transformer")
    add_lora(transformer, rank=8, alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], seed=1)
    random = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(value.shape, generator=random) for name, value in lora_state(transformer).items()}

    def made(program: str) -> Path:
        path = tmp_path / f"{program}.safetensors"
        save_file(dict(_written_by(program, tensors)), path)
        return path

    return made


def _written_by(program: str, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors.items():
        layer = name.removeprefix("transformer.").partition(".lora_")[0]
        flat = f"lora_unet__{layer.replace('.', '_')}"
        if program == "noprefix":
            yield name.removeprefix("transformer."), value
        elif program == "diffusers_alpha":
            yield name, value
            yield f"transformer.{layer}.alpha", torch.tensor(4.0)
        elif program == "kohya":
            yield f"{flat}.{'lora_down' if 'lora_A' in name else 'lora_up'}.weight", value
            yield f"{flat}.alpha", torch.tensor(4.0)
        else:
            yield name, value
            yield name.replace("blocks.1.", "blocks.41."), value.clone()


def test_a_lora_of_any_program_changes_the_video_alike(
    foreign: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = video(tmp_path / "without.mp4")
    known = {
        program: video(tmp_path / f"{program}.mp4", lora=foreign(program)) for program in ("kohya", "diffusers_alpha")
    }
    assert known["kohya"] == known["diffusers_alpha"] != without
    assert "alpha" not in capsys.readouterr().err
    full = video(tmp_path / "full.mp4", lora=foreign("noprefix"))
    told = capsys.readouterr().err
    assert "does not record the alpha; assuming the rank, 8" in told
    assert "--lora-alpha" in told
    assert full not in (without, known["kohya"])
    given = video(tmp_path / "given.mp4", lora=foreign("noprefix"), lora_alpha=4)
    assert "alpha" not in capsys.readouterr().err
    assert given == known["kohya"]
    assert video(tmp_path / "scaled.mp4", lora=foreign("noprefix"), lora_scale=0.5) == known["kohya"]
    assert video(tmp_path / "doubled.mp4", lora=foreign("kohya"), lora_scale=2) == full
    capsys.readouterr()
    assert video(tmp_path / "other.mp4", lora=foreign("kohya"), lora_alpha=8) == full
    assert "using --lora-alpha 8 instead of " in capsys.readouterr().err
    with pytest.raises(CogtuneError, match="does not fit tiny:2b") as caught:
        video(tmp_path / "toomany.mp4", lora=foreign("toomany"))
    assert "8 of its 16" not in str(caught.value)
    assert "4 of its 12 layers do not exist in the base: transformer_blocks.41.attn1" in str(caught.value)


def test_a_lora_given_as_the_model_is_told(lora: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="is a file, not a folder") as caught:
        fill_in(InferRequest(model=str(lora()), prompt="x"))
    assert "--lora" in caught.value.hint


def test_a_lora_that_changes_nothing_is_told(lora: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    fill_in(InferRequest(lora=lora()))
    assert "has no effect: all of its B matrices are zero" in capsys.readouterr().err


def test_a_strength_without_a_lora_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        fill_in(InferRequest(model="tiny:2b", prompt="x", lora_scale=0.5, lora_alpha=4))
    assert [line.split()[0] for line in caught.value.details] == ["--lora-scale", "--lora-alpha"]


def test_a_foreign_lora_without_a_model_names_what_it_fits(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(1, 1920), f"{name}B.weight": torch.ones(1920, 1)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UsageError, match="no base model: --model is missing") as caught:
        fill_in(InferRequest(lora=tmp_path / "a.safetensors", prompt="x"))
    assert caught.value.hint.endswith("its layers match 2b")


def refused(**asked: Any) -> tuple[str, ...]:
    with pytest.raises(UsageError, match="cannot sample this video") as caught:
        fill_in(InferRequest(**{"prompt": "x", **asked}))
    return caught.value.details


def test_what_the_model_cannot_do_is_told_at_once_and_before_it_is_loaded(tmp_path: Path) -> None:
    told = refused(model="tiny:5b", precision="fp16", steps=1001, size=Size(10, 64, 96))
    assert [line.split(":")[0] for line in told] == ["--size 10x64x96", "--precision fp16", "--steps 1001"]
    assert "overflows in fp16" in told[1]
    assert "must not exceed the model's 1000 timesteps" in told[2]
    missing = tmp_path / "missing.png"
    (line,) = refused(model="tiny:5b-i2v", image=missing)
    assert line == f"--image: no such file: {missing}"
    (line,) = refused(model="tiny:5b-i2v", image=tmp_path / "x.png", size=Size(17, 64, 96))[:1]
    assert "learned positions, which only work at 9x64x96" in line
    assert fill_in(InferRequest(model="tiny:2b", prompt="x", precision="fp16", steps=1000)).precision == "fp16"


def test_a_picture_that_is_none_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(module, "load_pipeline", refuse)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(CogtuneError, match="cannot read the image"):
        generate(InferRequest(model="tiny:5b-i2v", prompt="x", image=tmp_path / "a.png"), tmp_path / "a.mp4")


def test_a_prompt_beyond_the_models_limit_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    fill_in(InferRequest(model="tiny:2b", prompt="a red disc"))
    assert capsys.readouterr().err == ""
    fill_in(InferRequest(model="tiny:2b", prompt="a red disc moves " * 60))
    told = capsys.readouterr().err
    assert "but the model reads only 226; the rest is ignored" in told
    assert "'a red disc moves" in told


def test_an_unusual_size_gets_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    fill_in(InferRequest(model="tiny:2b", prompt="x", size=Size(9, 128, 96)))
    assert "size 128x96: the model was trained at 64x96\n" in capsys.readouterr().err


def test_no_video_is_replaced_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.zeros((2, 64, 96, 3), np.uint8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_pipeline", lambda _recipe: None)
    monkeypatch.setattr(module, "sample", lambda *_: frames)
    request = InferRequest(model="tiny:2b", prompt="x")
    assert [generate(request).video.name for _ in range(3)] == ["video.mp4", "video-2.mp4", "video-3.mp4"]
    there = tmp_path / "mine.mp4"
    there.write_bytes(b"an hour's work")
    with pytest.raises(UsageError, match=r"mine\.mp4 already exists") as caught:
        generate(request, there)
    assert "--force" in caught.value.hint
    assert there.read_bytes() == b"an hour's work"
    assert generate(request, there, force=True).video == there
    assert there.read_bytes() != b"an hour's work"

    def slowly(*_: object) -> Any:
        (tmp_path / "late.mp4").write_bytes(b"written by another meanwhile")
        return frames

    monkeypatch.setattr(module, "sample", slowly)
    assert generate(request, tmp_path / "late.mp4").video.name == "late-2.mp4"
    assert (tmp_path / "late.mp4").read_bytes() == b"written by another meanwhile"
