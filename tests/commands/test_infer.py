"""Sampling: what is asked for against what the run says, and what is refused before a model is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import close_session, constants
from PIL import Image, ImageSequence
from safetensors.torch import save_file

from cogtune.commands.infer import making
from cogtune.commands.infer.filling import fill_in
from cogtune.commands.infer.making import generate
from cogtune.commands.infer.request import InferRequest
from cogtune.data.layouts.own_files import is_generated
from cogtune.data.video.clips import write_video
from cogtune.data.video.generated import facts_of, frames_of, write_generated
from cogtune.modeling.adapters import add_lora, lora_state, save_lora
from cogtune.modeling.video_sampler import SampleInputs, VideoSamplerSetup
from cogtune.models.checkpoint_configs import fingerprint
from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.metrics import read_metrics
from cogtune.system.digests import digest_file
from cogtune.system.errors import CogtuneError, UsageError
from tests.support import containers
from tests.support.hub_server import Hub, Repository, serve
from tests.support.infer_frames import first_of


@pytest.fixture
def lora(tmp_path: Path, tiny: Callable[[str], Path]) -> Callable[..., str]:
    """A LoRA file that says it was trained on tiny:2b."""

    def made(**facts: Any) -> str:
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
        return str(path)

    return made


def zero_run(output: Path) -> Path:
    """A run with one checkpoint whose weights are in shards; the checkpoint."""
    checkpoint = output / "checkpoint-2"
    (checkpoint / "pytorch_model").mkdir(parents=True)
    (checkpoint / "latest").write_text("pytorch_model")
    (checkpoint / "state.json").write_text("{}")
    return checkpoint


def test_an_empty_prompt_is_a_prompt(lora: Callable[..., str]) -> None:
    assert fill_in(InferRequest(loras=(lora(),), prompts=("",))).rows[0].prompt == ""
    assert fill_in(InferRequest(loras=(lora(),))).rows[0].prompt == "a red disc"
    with pytest.raises(UsageError) as caught:
        fill_in(InferRequest(loras=(lora(prompt=None),)))
    assert caught.value.details == ("--prompt is required",)


def test_a_model_with_a_damaged_file_is_told(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("2b"), folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CogtuneError, match="cannot load") as caught:
        generate(InferRequest(model=str(folder), prompts=("a boat",), output=tmp_path / "boat.mp4"))
    assert str(folder) in caught.value.message
    assert "damaged" in caught.value.hint


def test_a_part_of_a_model_is_told_for_what_it_is(tmp_path: Path, lora: Callable[..., str]) -> None:
    for name, told in (
        (LORA_WEIGHTS_NAME, "it is a LoRA; pass it as --lora"),
        ("config.json", "it is only a transformer"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        with pytest.raises(CogtuneError, match="is not a diffusers checkpoint") as caught:
            fill_in(InferRequest(model=str(tmp_path / name), prompts=("a boat",)))
        assert told in caught.value.hint


def test_a_lora_on_another_base_is_told_and_goes_on(
    lora: Callable[..., str], tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("5b")  # made now, since the making writes to stderr
    capsys.readouterr()
    fill_in(InferRequest(loras=(lora(),)))
    fill_in(InferRequest(loras=(lora(),), model=str(tiny("2b"))))
    fill_in(InferRequest(loras=(lora(identity=None),), model="tiny:5b"))
    assert "was trained on" not in capsys.readouterr().err
    recipe = fill_in(InferRequest(loras=(lora(),), model="tiny:5b"))
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
    request = InferRequest(model=str(given)) if option == "model" else InferRequest(loras=(str(given),))
    with pytest.raises(UsageError) as caught:
        fill_in(request)
    assert f"run `cogtune merge-zero '{checkpoint}'`" in caught.value.hint


def test_a_zero_checkpoint_with_its_lora_needs_no_merging(tmp_path: Path, lora: Callable[..., str]) -> None:
    checkpoint = zero_run(tmp_path / "run")
    Path(lora()).rename(checkpoint / LORA_WEIGHTS_NAME)
    ((found, weight),) = fill_in(InferRequest(loras=(str(tmp_path / "run"),))).loras
    assert (found.path, weight) == (checkpoint / LORA_WEIGHTS_NAME, 1.0)


def test_an_output_that_cannot_be_written_is_told_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(output: Path) -> CogtuneError:
        with pytest.raises(CogtuneError) as caught:
            fill_in(InferRequest(model="tiny:2b", prompts=("x",), output=output))
        return caught.value

    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for output, why in (
        (tmp_path / "folder.mp4", "it is a folder"),
        (tmp_path / "file" / "x.mp4", f"cannot write {tmp_path}/file/x.mp4: "),
        (tmp_path / "file" / "deeper" / "x.mp4", f"cannot write {tmp_path}/file/deeper/x.mp4: "),
        (tmp_path / "file", f"{tmp_path / 'file'} is a file"),
    ):
        assert why in failed(output).message
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"{tmp_path} is not writable" in failed(tmp_path / "new" / "x.mp4").message


def test_lines_that_say_no_step_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 0.5}\n'
    file.write_bytes(good + b'3\n[]\nnull\n{}\n{"step": "2"}\n{"step": true}\n\xff\n{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1, "loss": 0.5}]


# ---------------------------------------------------------------------------------------- what is sampled, in files


def video(output: Path, **asked: Any) -> bytes:
    """The bytes of a video of two steps on tiny:2b."""
    recipe = fill_in(InferRequest(model="tiny:2b", prompts=("a red disc",), steps=2, **asked))
    write_video(output, first_of(recipe), recipe.fps)
    return output.read_bytes()


@pytest.fixture
def foreign(tmp_path: Path, tiny: Callable[[str], Path]) -> Callable[[str], str]:
    """One adapter of rank 8 and alpha 4 as several programs write it."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny("2b") / "transformer")
    add_lora(transformer, rank=8, alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], seed=1)
    random = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(value.shape, generator=random) for name, value in lora_state(transformer).items()}

    def made(program: str) -> str:
        path = tmp_path / f"{program}.safetensors"
        save_file(dict(_written_by(program, tensors)), path)
        return str(path)

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


@pytest.mark.slow
def test_a_lora_of_any_program_changes_the_video_alike(
    foreign: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = video(tmp_path / "without.mp4")
    known = {
        program: video(tmp_path / f"{program}.mp4", loras=(foreign(program),))
        for program in ("kohya", "diffusers_alpha")
    }
    assert known["kohya"] == known["diffusers_alpha"] != without
    assert "alpha" not in capsys.readouterr().err
    full = video(tmp_path / "full.mp4", loras=(foreign("noprefix"),))
    told = capsys.readouterr().err
    assert "does not record the alpha; assuming the rank, 8" in told
    assert "--lora-alpha" in told
    assert full not in (without, known["kohya"])
    given = video(tmp_path / "given.mp4", loras=(foreign("noprefix"),), lora_alpha=4)
    assert "alpha" not in capsys.readouterr().err
    assert given == known["kohya"]
    assert video(tmp_path / "scaled.mp4", loras=(foreign("noprefix"),), lora_scales=(0.5,)) == known["kohya"]
    assert video(tmp_path / "doubled.mp4", loras=(foreign("kohya"),), lora_scales=(2,)) == full
    capsys.readouterr()
    assert video(tmp_path / "other.mp4", loras=(foreign("kohya"),), lora_alpha=8) == full
    assert "using --lora-alpha 8 instead of " in capsys.readouterr().err
    with pytest.raises(CogtuneError, match="does not fit tiny:2b") as caught:
        video(tmp_path / "toomany.mp4", loras=(foreign("toomany"),))
    assert "8 of its 16" not in str(caught.value)
    assert "4 of its 12 layers do not exist in the base: transformer_blocks.41.attn1" in str(caught.value)


def test_a_lora_given_as_the_model_is_told(lora: Callable[..., str]) -> None:
    with pytest.raises(UsageError, match="is a file, not a folder") as caught:
        fill_in(InferRequest(model=lora(), prompts=("x",)))
    assert "--lora" in caught.value.hint


def test_a_lora_that_changes_nothing_is_told(lora: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    fill_in(InferRequest(loras=(lora(),)))
    assert "has no effect: all of its B matrices are zero" in capsys.readouterr().err


def test_a_strength_without_a_lora_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        fill_in(InferRequest(model="tiny:2b", prompts=("x",), lora_scales=(0.5,), lora_alpha=4))
    assert [line.split()[0] for line in caught.value.details] == ["--lora-scale", "--lora-alpha"]


@pytest.mark.parametrize("weight", ["nan", "inf", "-1e400"])
def test_a_weight_that_is_no_number_is_refused(weight: str, lora: Callable[..., str]) -> None:
    with pytest.raises(UsageError) as caught:
        fill_in(InferRequest(loras=(f"{lora()}:{weight}",), prompts=("x",)))
    assert "is not a finite number" in " ".join((caught.value.message, *caught.value.details))


def test_a_foreign_lora_without_a_model_names_what_it_fits(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(1, 1920), f"{name}B.weight": torch.ones(1920, 1)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UsageError, match="no base model: --model is missing") as caught:
        fill_in(InferRequest(loras=(str(tmp_path / "a.safetensors"),), prompts=("x",)))
    assert caught.value.hint.endswith("its layers match 2b")


def refused(**asked: Any) -> tuple[str, ...]:
    with pytest.raises(UsageError, match="cannot sample this video") as caught:
        fill_in(InferRequest(**{"prompts": ("x",), **asked}))
    return caught.value.details


def test_what_the_model_cannot_do_is_told_at_once_and_before_it_is_loaded(tmp_path: Path) -> None:
    told = refused(model="tiny:5b", precision="fp16", steps=1001, size="10x64x96")
    assert [line.split(":")[0] for line in told] == ["--size 10x64x96", "--precision fp16", "--steps 1001"]
    assert "overflows in fp16" in told[1]
    assert "must not exceed the model's 1000 timesteps" in told[2]
    with pytest.raises(UsageError, match="--num-videos must be at most 100,000, got 1,000,000,000,000"):
        fill_in(InferRequest(model="tiny:2b", prompts=("x",), num_videos=10**12))
    missing = tmp_path / "missing.png"
    (line,) = refused(model="tiny:5b-i2v", images=(missing,))
    assert line == f"--image: no such file: {missing}"
    (line,) = refused(model="tiny:5b-i2v", images=(tmp_path / "x.png",), size="17x64x96")[1:]
    assert "learned positions, which only work at 9x64x96" in line
    assert fill_in(InferRequest(model="tiny:2b", prompts=("x",), precision="fp16", steps=1000)).precision == "fp16"


def test_a_picture_that_is_none_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(making, "VideoSampler", refuse)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(CogtuneError, match="cannot read the image"):
        generate(
            InferRequest(model="tiny:5b-i2v", prompts=("x",), images=(tmp_path / "a.png",), output=tmp_path / "a.mp4")
        )


def test_a_prompt_beyond_the_models_limit_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    fill_in(InferRequest(model="tiny:2b", prompts=("a red disc",)))
    assert capsys.readouterr().err == ""
    fill_in(InferRequest(model="tiny:2b", prompts=("a red disc moves " * 60,)))
    told = capsys.readouterr().err
    assert "but the model reads only 226; the rest is ignored" in told
    assert "'a red disc moves" in told


def test_an_unusual_size_gets_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    fill_in(InferRequest(model="tiny:2b", prompts=("x",), size="9x128x96"))
    assert "size 128x96: the model was trained at 64x96\n" in capsys.readouterr().err


class Fake:
    """Stands in for a loaded model: videos of one colour, which the seed decides, but for a corner."""

    meanwhile: Path | None = None
    """A file that another program writes while a video is sampled."""
    loaded, inputs_seen = 0, list[SampleInputs]()

    def __init__(self, setup: VideoSamplerSetup, texts: Sequence[str], tell: Callable[[str], None]) -> None:
        Fake.loaded += 1
        self.texts = set(texts)

    def sample(self, inputs: SampleInputs, on_step: Callable[[int], None]) -> np.ndarray[Any, Any]:
        assert {inputs.prompt, inputs.negative_prompt} <= self.texts
        Fake.inputs_seen.append(inputs)
        if Fake.meanwhile is not None:
            Fake.meanwhile.write_bytes(b"written by another meanwhile")
        video = np.full((inputs.size.num_frames, 64, 96, 3), inputs.seed % 256, np.uint8)
        for number, frame in enumerate(video):
            frame[:8, :8] = 25 * number  # files may hold frames that are alike once
        return video


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """No model is loaded; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(making, "VideoSampler", Fake)
    for name, value in (("meanwhile", None), ("loaded", 0), ("inputs_seen", [])):
        monkeypatch.setattr(Fake, name, value)
    return Fake


def made(**asked: Any) -> list[str]:
    """The names of the videos that a request leaves."""
    return [one.path.name for one in generate(InferRequest(**{"model": "tiny:2b", "prompts": ("x",), **asked}))]


def test_no_video_is_replaced_unless_it_is_asked_for(tmp_path: Path, fake: type[Fake]) -> None:
    there = tmp_path / "mine.mp4"
    there.write_bytes(b"an hour's work")
    with pytest.raises(UsageError, match=r"mine\.mp4 already exists") as caught:
        made(output=there)
    assert "--force" in caught.value.hint
    assert there.read_bytes() == b"an hour's work"
    assert made(output=there, force=True) == ["mine.mp4"]
    assert there.read_bytes() != b"an hour's work"
    (tmp_path / "x-42.mp4").write_bytes(b"another hour's work")
    assert made() == ["x-42-2.mp4"]
    assert (tmp_path / "x-42.mp4").read_bytes() == b"another hour's work"
    fake.meanwhile = tmp_path / "late.mp4"
    assert made(output=tmp_path / "late.mp4") == ["late-2.mp4"]
    assert (tmp_path / "late.mp4").read_bytes() == b"written by another meanwhile"


def test_what_is_there_is_not_made_again_and_one_model_makes_all_the_rest(
    tmp_path: Path, fake: type[Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(prompts=("a boat", "a car"), num_videos=2) == [
        f"{what}-{seed}.mp4" for what in ("a-boat", "a-car") for seed in (42, 43)
    ]
    assert (fake.loaded, len(fake.inputs_seen)) == (1, 4)
    capsys.readouterr()
    before = (tmp_path / "a-car-43.mp4").stat()
    names = made(prompts=("a boat", "a car"), num_videos=3)
    assert names[2::3] == ["a-boat-44.mp4", "a-car-44.mp4"]
    assert (fake.loaded, [inputs.seed for inputs in fake.inputs_seen[4:]]) == (2, [44, 44])
    assert capsys.readouterr().err.count("already exists: skipped") == 4
    assert (tmp_path / "a-car-43.mp4").stat().st_mtime_ns == before.st_mtime_ns
    made(prompts=("a boat",), steps=49)
    assert fake.loaded == 3, "with other settings it is another video"
    assert made(prompts=("a boat",), steps=49) == ["a-boat-42-2.mp4"]
    assert fake.loaded == 3
    assert made(prompts=("a boat",), output=tmp_path / "a-boat-43.mp4", seed=43) == ["a-boat-43.mp4"]
    assert fake.loaded == 3
    made(prompts=("a boat",), force=True)
    assert fake.loaded == 4
    for formats in ({"base_precision": "fp8"}, {"text_encoder_precision": "fp8"}):
        (name,) = made(prompts=("a boat",), **formats)
        facts = facts_of(tmp_path / name)
        assert facts is not None
        assert formats.items() <= facts.items()
        assert made(prompts=("a boat",), **formats) == [name]
    assert fake.loaded == 6


def test_a_video_says_what_it_was_made_of(
    tmp_path: Path, tiny: Callable[[str], Path], fake: type[Fake], lora: Callable[..., str]
) -> None:
    file = Path(lora())
    for form in ("mp4", "webp", "gif"):
        (name,) = made(model=None, loras=(f"{file}:0.5",), prompts=("a «boat»",), lora_scales=(2,), format=form)
        assert name == f"a-boat-42.{form}"
        facts = facts_of(tmp_path / name)
        assert facts is not None
        told = {key: facts[key] for key in ("prompt", "seed", "model", "weights", "size", "scheduler", "loras")}
        assert told == {
            "prompt": "a «boat»",
            "seed": 42,
            "model": "tiny:2b",
            "weights": fingerprint(tiny("2b"), "transformer"),
            "size": "9x64x96",
            "scheduler": "ddim",
            "loras": [{"file": file.name, "digest": digest_file(file), "weight": 1.0, "alpha": 2.0}],
        }
        assert made(model=None, loras=(f"{file}:1",), prompts=("a «boat»",), format=form) == [name]
        assert frames_of(tmp_path / name)[0].mean() == pytest.approx(42, abs=3)
    assert fake.loaded == 3
    assert {len(frames_of(tmp_path / f"a-boat-42.{form}")) for form in ("mp4", "webp", "gif")} == {9}
    assert is_generated(tmp_path / "a-boat-42.mp4")


def test_an_mp4_has_what_players_ask_for(tmp_path: Path, fake: type[Fake]) -> None:
    import av

    (name,) = made(prompts=("a boat",))
    data = (tmp_path / name).read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat"), "the index comes first"
    with av.open(str(tmp_path / name)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames, float(stream.average_rate or 0)) == (96, 64, 9, 8.0)
        assert container.metadata["title"] == "a boat"


def test_webp_and_gif_last_as_long_as_the_mp4(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)
    for suffix in ("gif", "webp"):
        write_generated(tmp_path / f"x.{suffix}", frames, 16, {}, "mark")
        with Image.open(tmp_path / f"x.{suffix}") as image:
            durations = []
            for frame in ImageSequence.Iterator(image):
                frame.load()
                durations.append(frame.info["duration"])
        assert (len(durations), sum(durations)) == (9, 560)
        assert frames_of(tmp_path / f"x.{suffix}").shape == frames.shape


def test_a_grid_shows_all_videos(tmp_path: Path, fake: type[Fake]) -> None:
    names = made(prompts=("a", "b"), num_videos=3, grid=True)
    seen = frames_of(tmp_path / names[-1])
    assert names[-1].startswith("grid-")
    assert seen.shape == (9, 2 * 64, 3 * 96, 3)
    shades = seen[0].reshape(2, 64, 3, 96, 3)[:, 16:].mean((1, 3, 4))
    assert shades == pytest.approx(np.array([[42, 43, 44]] * 2), abs=2)
    loaded = fake.loaded
    again = generate(InferRequest(model="tiny:2b", prompts=("a", "b"), num_videos=3, grid=True))
    assert ([one.path.name for one in again], str(again[-1].size)) == (names, "9x128x288")
    assert fake.loaded == loaded
    assert frames_of(tmp_path / made(prompts=("a", "b", "c"), grid=True)[-1]).shape == (9, 64, 3 * 96, 3)


def test_prompts_pictures_and_clips_are_paired(tmp_path: Path, fake: type[Fake]) -> None:
    for name, colour in (("b.png", 200), ("a.png", 100)):
        Image.new("RGB", (96, 64), (colour,) * 3).save(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    i2v: dict[str, Any] = {"model": "tiny:5b-i2v", "images": (tmp_path,)}
    assert made(**i2v, prompts=("prompts.txt",)) == ["one-a-42.mp4", "two-b-42.mp4"]
    assert [
        (inputs.prompt, float(inputs.image.float().mean())) for inputs in fake.inputs_seen if inputs.image is not None
    ] == [
        ("one", 100.0),
        ("two", 200.0),
    ]
    assert made(**i2v, prompts=("x",)) == ["x-a-42.mp4", "x-b-42.mp4"]
    with pytest.raises(UsageError) as caught:
        made(**i2v, prompts=("x", "y", "z"))
    assert caught.value.details == ("3 prompts and 2 images: pass one for all, or the same number of each",)


def test_a_sweep_of_scales_makes_a_video_each(fake: type[Fake], lora: Callable[..., str]) -> None:
    assert made(model=None, loras=(lora(),), lora_scales=(0.5, 1, 1.5)) == [
        f"x-42-x{scale}.mp4" for scale in ("0.5", "1", "1.5")
    ]
    assert [inputs.lora_scale for inputs in fake.inputs_seen] == [0.5, 1, 1.5]


def test_the_runs_id_token_is_put_in_front(lora: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    def prompts(*given: str, **asked: Any) -> list[str]:
        return [row.prompt for row in fill_in(InferRequest(loras=(lora(id_token="sks"),), prompts=given, **asked)).rows]

    assert prompts("a boat", "a sks car", "") == ["sks a boat", "a sks car", ""]
    assert "adding the run's id token 'sks' to the prompt" in capsys.readouterr().err
    assert prompts() == ["a red disc"], "the run's own caption has it already, or has none"
    assert prompts("a boat", id_token="") == ["a boat"]
    assert prompts("a boat", id_token="bob") == ["bob a boat"]


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, lora: Callable[..., str]) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no clip")
    with pytest.raises(UsageError) as caught:
        fill_in(
            InferRequest(
                loras=(lora(), str(tmp_path / "none")),
                prompts=(str(tmp_path / "none.txt"),),
                videos=(tmp_path / "clip.mp4", tmp_path / "clop.mp4"),
                strength=1.5,
                size="64x90",
                frames=10,
                vram="much",
                output=tmp_path / "x.avi",
            )
        )
    told = "\n".join(caught.value.details)
    assert [
        sign
        for sign in (
            "--strength must be greater than 0 and at most 1, got 1.5",
            "--vram: 'much'",
            f"no such file or folder: {tmp_path / 'none'}",
            f"--prompt: cannot read {tmp_path / 'none.txt'}",
            f"--video: no such file: {tmp_path / 'clop.mp4'}; did you mean {tmp_path / 'clip.mp4'}?",
            "clip.mp4 is",
            "--size 10x64x90: 10 frames",
            "--size 10x64x90: width 90",
            ".mp4, .webp, .gif",
        )
        if sign not in told
    ] == []


def test_what_is_wrong_with_a_clip_is_told_as_of_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = containers.clip(tmp_path / "a.mkv", streams=2)
    path.write_bytes(path.read_bytes() * 2)
    fill_in(InferRequest(model="tiny:5b", prompts=("x",), videos=(path,), size="9x64x96"))
    told = " ".join(capsys.readouterr().err.split())
    assert "a.mkv is 2 files joined end to end" in told
    assert "a.mkv contains 2 video streams" in told


def test_what_a_video_is_made_of_decides_its_frames(
    tmp_path: Path, film: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = film / "videos" / "0.mp4"  # 100 frames at 16 fps
    recipe = fill_in(InferRequest(model="tiny:1.5-5b", prompts=("x",), videos=(clip,)))
    assert (str(recipe.size), recipe.views[clip].indices) == ("17x64x96", tuple(range(17)))
    recipe = fill_in(InferRequest(model="tiny:1.5-5b", prompts=("x",), videos=(clip,), size="64x96", fps=4, frames=25))
    assert recipe.views[clip].indices == tuple(range(0, 100, 4))
    assert (str(recipe.size), recipe.fps) == ("25x64x96", 4.0)
    write_video(tmp_path / "short.mp4", np.zeros((12, 64, 96, 3), np.uint8), 16.0)
    capsys.readouterr()
    recipe = fill_in(InferRequest(model="tiny:1.5-5b", prompts=("x",), videos=(tmp_path / "short.mp4",)))
    assert recipe.size.num_frames == 9
    assert "making 9 frames instead of 17: --video has 12 at 16 fps" in capsys.readouterr().err
    (line,) = refused(model="tiny:1.5-5b", videos=(tmp_path / "short.mp4",), frames=17)
    assert "needs 17 frames for 17 at 16 fps" in line
    (line,) = refused(model="tiny:2b", videos=(clip,), steps=3, strength=0.3)
    assert line == "--strength 0.3 leaves none of 3 steps; use more --steps"


# ------------------------------------------------------------------------------------------------ from the Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server in the Hub's place, and an empty cache of what was fetched from it."""
    state = Hub(users={"hf_token": "anna"})
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_CACHE", str(tmp_path / "hub")),
    ):
        monkeypatch.setattr(constants, name, value)
    with serve(state) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        close_session()
        yield state
    close_session()


def in_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_lora_on_the_hub_is_given_by_its_id(
    hub: Hub, lora: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(lora()).read_bytes()
    hub.repositories["anna/boats"] = Repository("model", False, {"main": [{LORA_WEIGHTS_NAME: data}]})
    hub.repositories["anna/many"] = Repository("model", False, {"main": [{"a.safetensors": data, "b.bin": b""}]})
    recipe = fill_in(InferRequest(loras=("anna/boats:0.5", "anna/many/a.safetensors")))
    assert [(found.path.name, weight) for found, weight in recipe.loras] == [
        (LORA_WEIGHTS_NAME, 0.5),
        ("a.safetensors", 1.0),
    ]
    assert recipe.rows[0].prompt == "a red disc"
    with pytest.raises(UsageError, match="anna/many on the Hub has no LoRA by one of the names") as caught:
        fill_in(InferRequest(loras=("anna/many",)))
    assert "anna/many/FILE.safetensors" in caught.value.hint
    assert not any("b.bin" in request for request in hub.requests)
    with pytest.raises(UsageError, match=r"has no file c\.safetensors"):
        fill_in(InferRequest(loras=("anna/many/c.safetensors",)))
    with pytest.raises(CogtuneError, match="model anna/nothing does not exist on the Hub"):
        fill_in(InferRequest(loras=("anna/nothing",)))
    asked = len(hub.requests)
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    for path in ("out/checkpoint-5", "anna/x.safetensors", "./anna/boats"):
        with pytest.raises(UsageError, match=f"no such file or folder: {Path(path)}"):
            fill_in(InferRequest(loras=(path,)))
    assert len(hub.requests) == asked, "what is a path is not looked for on the Hub"


def test_full_weights_on_the_hub_are_given_by_their_id(hub: Hub, tiny: Callable[[str], Path]) -> None:
    """A transformer as `cogtune push` puts it there, whose run.yaml names the base; and a whole model."""
    whole = in_files(tiny("2b"))
    part = {name: data for name, data in whole.items() if name.startswith("transformer/")}
    run = b"model: tiny:2b\nsize: 17x64x96\nfps: 4\nprecision: fp32\nid_token: sks\n"
    hub.repositories["anna/boats"] = Repository("model", False, {"main": [{**part, "run.yaml": run}]})
    hub.repositories["anna/whole"] = Repository("model", False, {"main": [whole]})
    recipe = fill_in(InferRequest(model="anna/boats", prompts=("a boat",)))
    assert recipe.transformer is not None
    assert in_files(recipe.transformer.parent).keys() >= part.keys()
    assert (recipe.base, str(recipe.size), recipe.fps, recipe.precision) == (tiny("2b"), "17x64x96", 4.0, "fp32")
    assert recipe.rows[0].prompt == "sks a boat"
    recipe = fill_in(InferRequest(model="anna/whole", prompts=("a boat",)))
    assert recipe.transformer is None
    assert first_of(recipe).shape == (9, 64, 96, 3)
    hub.repositories["anna/other"] = Repository("model", False, {"main": [{"README.md": b"x"}]})
    with pytest.raises(UsageError, match="anna/other on the Hub is neither a complete model nor a transformer"):
        fill_in(InferRequest(model="anna/other", prompts=("a boat",)))
