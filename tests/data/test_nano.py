"""The nano models' world, the detector that reads it, and the layout; their training scripts."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cogtune.data.nano import detector, world
from cogtune.data.nano.lessons import TAUGHT, draw_lesson
from cogtune.data.sources import read_dataset
from cogtune.data.video.clips import read_frames
from cogtune.system.digests import digest
from cogtune.system.errors import CogtuneError, UsageError

ROOT = Path(__file__).parents[2]
RED_DISC = world.Subject("red", "disc", "right", "black")
PINNED_HELD_OUT = "7b9dd95c306f529fc27bd69a29470fa0"
PINNED_CAPTIONS = [
    "A ring on a night sky is blue and falls.",
    "There is a yellow square on a night sky. It moves up to the top.",
    "Plain pale blue, and a blue ring that circles around the middle.",
]
PINNED_MEANS = [[17.25, 57.56, 98.09], [39.44, 70.97, 86.95], [184.7, 214.01, 240.8]]
Y, X = np.mgrid[0:64, 0:96] + 0.5

Frames = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Cover = Callable[[int], npt.NDArray[np.float64]]


def subjects(count: int, *, held_out: bool = False) -> list[world.Subject]:
    every = world.known_subjects(held_out=held_out)
    return [every[place] for place in np.random.default_rng(3).choice(len(every), count, replace=False)]


def new_subjects() -> list[world.Subject]:
    words = itertools.product(world.NEW_COLOURS, world.NEW_SHAPES, world.NEW_MOTIONS)
    return [world.Subject(*three, background) for three in words for background in world.backgrounds_for(three[0])]


def blurred(frames: Frames) -> npt.NDArray[np.float64]:
    """With a normal of one pixel's deviation along both sides."""
    weights = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    weights /= weights.sum()
    soft: npt.NDArray[np.float64] = frames.astype(float)
    for axis in (1, 2):
        padding = [(3, 3) if dim == axis else (0, 0) for dim in range(4)]
        padded = np.pad(soft, padding, mode="edge")
        soft = np.sum(
            [
                weight * padded.take(range(start, start + soft.shape[axis]), axis)
                for start, weight in enumerate(weights)
            ],
            axis=0,
        )
    return soft


def at_28_db(frames: Frames, random: np.random.Generator) -> Frames:
    """Blurred, and then as noisy as it takes for a PSNR of 28 dB, if the blur leaves that much: a poor VAE's work."""
    soft = blurred(frames)
    spare = max(0.0, 255**2 / 10**2.8 - ((soft - frames) ** 2).mean())
    return (soft + random.normal(0, spare**0.5, soft.shape)).clip(0, 255).round().astype(np.uint8)


def clip_of(cover: Cover, paint: Colour = (222, 48, 52), background: Colour = (16, 16, 20)) -> Frames:
    """A clip of the cover (0 to 1) that ``cover`` gives for each frame."""
    covers = np.stack([np.clip(cover(frame), 0, 1) for frame in range(17)])[..., None]
    return (np.array(background) * (1 - covers) + np.array(paint) * covers).round().astype(np.uint8)


def across(frame: int) -> float:
    return 20 + 56 * frame / 16


def disc(x: float, y: float = 32.0, radius: float = 12.0) -> npt.NDArray[np.float64]:
    cover: npt.NDArray[np.float64] = 0.5 - (np.hypot(X - x, Y - y) - radius)
    return cover


class TestWorld:
    def test_a_scene_is_a_function_of_its_seed_and_number_alone(self) -> None:
        together = world.training_scenes(5, range(40))
        alone = world.training_scenes(5, [31])[0]
        assert alone.caption == together[31].caption
        assert np.array_equal(world.draw(alone), world.draw(together[31]))
        assert not np.array_equal(world.draw(world.training_scenes(6, [31])[0]), world.draw(alone))

    def test_what_a_seed_draws_is_that_of_this_version(self) -> None:
        assert world.WORLD_VERSION == 2
        scenes = world.training_scenes(0, range(3))
        assert [scene.caption for scene in scenes] == PINNED_CAPTIONS
        means = [world.draw(scene).mean(axis=(0, 1, 2)) for scene in scenes]
        assert np.allclose(means, PINNED_MEANS, atol=0.02)
        assert digest(sorted(map(list, world.HELD_OUT))) == PINNED_HELD_OUT

    def test_numpy_and_torch_draw_the_same(self) -> None:
        scenes = [
            world.scene_of(subject, np.random.default_rng(1)) for subject in [*subjects(12), *new_subjects()[::9]]
        ]
        tensors = world.draw_batch(scenes, "cpu")
        assert tensors.shape == (len(scenes), 3, 17, 64, 96)
        as_pixels = ((tensors + 1) * 127.5).round().permute(0, 2, 3, 4, 1).numpy()
        apart = np.abs(as_pixels - np.stack([world.draw(scene) for scene in scenes]).astype(float))
        assert apart.max() <= 1  # a half may be rounded either way
        assert (apart > 0).mean() < 1e-3

    def test_edges_are_soft(self) -> None:
        frame = world.draw(world.scene_of(world.Subject("white", "disc", "still", "black"), np.random.default_rng(0)))[
            0
        ]
        between = (frame[..., 0] > 60) & (frame[..., 0] < 200)
        assert 20 < between.sum() < 120

    def test_each_subject_comes_once_a_round_and_none_that_is_held_out(self) -> None:
        known = world.known_subjects()
        assert len(known) == 1655
        scenes = world.training_scenes(2, range(2 * len(known)))
        counts = Counter(scene.subject for scene in scenes)
        assert set(counts) == set(known)
        assert set(counts.values()) == {2}
        assert not {scene.subject.combination for scene in scenes} & world.HELD_OUT

    def test_every_word_of_a_held_out_combination_is_known_from_others(self) -> None:
        assert len(world.HELD_OUT) == len(world.held_out_prompts()) == 64
        every: tuple[Collection[str], ...] = (world.COLOURS, world.SHAPES, world.MOTIONS)
        for place, names in enumerate(every):
            assert {words[place] for words in world.HELD_OUT} <= set(names)
            assert {subject.combination[place] for subject in world.known_subjects()} == set(names)

    def test_new_words_are_in_no_training_caption(self) -> None:
        captions = " ".join(scene.caption.lower() for scene in world.training_scenes(0, range(3000)))
        for word in [*world.NEW_COLOURS, *world.NEW_SHAPES, "beat", "zigzag"]:
            assert word not in captions

    def test_shapes_stay_in_the_frame(self) -> None:
        for subject in [*subjects(200), *new_subjects()]:
            frames = world.draw(world.scene_of(subject, np.random.default_rng(8))).astype(int)
            sides = frames[:, :, [0, -1]]
            assert np.ptp(sides, axis=(0, 2)).max() <= 1, subject  # nothing but background left and right

    def test_the_same_thing_is_said_in_many_ways(self) -> None:
        random = np.random.default_rng(0)
        said = {world.caption_of(RED_DISC, random) for _ in range(300)}
        assert len(said) > 40
        assert all("red" in caption for caption in said)
        assert world.caption_of(RED_DISC) == "A red disc slides to the right on a black background."


class TestDetector:
    @pytest.mark.parametrize("part", ["known", "held out", "new"])
    @pytest.mark.parametrize("seen", ["clean", "at 28 dB"])
    def test_reads_every_clip_right(self, part: str, seen: str) -> None:
        asked = {"known": subjects(60), "held out": subjects(40, held_out=True), "new": new_subjects()[::2]}[part]
        random = np.random.default_rng(9)
        pairs = []
        for subject in asked:
            frames = world.draw(world.scene_of(subject, random))
            pairs.append((subject, detector.detect(frames if seen == "clean" else at_28_db(frames, random))))
        for name in ("colour", "shape", "motion", "background"):
            wrong = {pair: n for pair, n in detector.confusion(pairs, name).items() if pair[0] != pair[1]}
            assert wrong == {}, name
        assert sum(reading.shows(subject) for subject, reading in pairs) == len(asked)

    @pytest.mark.parametrize(
        "cover",
        [
            lambda frame: np.exp(-((X - across(frame)) ** 2 + (Y - 32) ** 2) / (2 * 8**2)),
            lambda frame: 0.5 - (np.hypot((X - across(frame)) / 1.5, Y - 32) - 10),
            lambda frame: disc(across(frame)) * (Y < 32),
            lambda frame: np.maximum(disc(across(frame), 18, 9), disc(across(frame), 46, 9)),
            lambda frame: (abs(X - across(frame)) < 14) & (abs(Y - 32) < 7),
            lambda frame: disc(across(frame)) if frame < 9 else 0 * X,
            lambda frame: (
                disc(across(frame)) if frame < 9 else 0.5 - np.maximum(abs(X - across(frame)), abs(Y - 32)) + 11
            ),
            lambda frame: 0.15 * np.clip(disc(across(frame)), 0, 1),
            lambda frame: (X // 8 + frame) % 2,
        ],
        ids=[
            "blob",
            "ellipse",
            "half a disc",
            "two discs",
            "rectangle",
            "gone",
            "becomes a square",
            "faint",
            "stripes",
        ],
    )
    def test_what_is_no_shape_of_the_world_is_none(self, cover: Cover) -> None:
        assert detector.detect(clip_of(cover)).shape is None

    @pytest.mark.parametrize(
        "centre",
        [
            lambda frame: (40 + frame, 32),
            lambda frame: (across(frame), 18 + 28 * frame / 16),
            lambda frame: (48 + 22 * np.cos(frame * np.pi / 8), 32 - 15 * np.sin(frame * np.pi / 8)),
            lambda frame: (20 + 53 * (frame * 7 % 17) / 16, 32),
        ],
        ids=["too short a way", "aslant", "anticlockwise", "leaping about"],
    )
    def test_what_is_no_motion_of_the_world_is_none(self, centre: Callable[[int], tuple[float, float]]) -> None:
        reading = detector.detect(clip_of(lambda frame: disc(*centre(frame))))
        assert (reading.colour, reading.shape, reading.motion) == ("red", "disc", None)

    def test_noise_is_nothing(self) -> None:
        random = np.random.default_rng(4)
        for _ in range(20):
            fine = random.integers(0, 256, (17, 64, 96, 3)).astype(np.uint8)
            coarse = random.normal(128, 60, (5, 8, 12, 3)).repeat(4, 0)[:17].repeat(8, 1).repeat(8, 2)
            for frames in (fine, coarse.clip(0, 255).astype(np.uint8)):
                reading = detector.detect(frames)
                assert (reading.colour, reading.shape, reading.motion) == (None, None, None)

    def test_another_colour_is_none(self) -> None:
        assert detector.detect(clip_of(lambda frame: disc(across(frame)), paint=(120, 90, 60))).colour is None
        assert detector.detect(clip_of(lambda frame: disc(across(frame)), background=(120, 0, 90))).background is None

    def test_a_reading_shows_only_what_it_says(self) -> None:
        reading = detector.detect(clip_of(lambda frame: disc(across(frame))))
        assert reading.shows(RED_DISC)
        for other in (("blue", "disc", "right"), ("red", "ring", "right"), ("red", "disc", "left")):
            assert not reading.shows(world.Subject(*other, "black"))
        assert reading.path[:, 0] == pytest.approx([across(frame) for frame in range(17)], abs=0.1)
        assert reading.path[:, 2] == pytest.approx(12, abs=0.2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts with random weights, in fp16 as they are shipped."""
    from transformers import T5Config, T5EncoderModel

    from cogtune.modeling import nano, random_weights
    from cogtune.models.nano_models import transformer_part
    from cogtune.models.variants import NANO_VARIANTS

    folder = tmp_path_factory.mktemp("nano") / "parts"
    folder.mkdir()
    random_weights.write_tokenizer(folder / "tokenizer", random_weights._tokenizer_model(), max_tokens=48)
    T5EncoderModel(T5Config(**nano.nano_text_config(1024))).half().save_pretrained(folder / "text_encoder")
    nano.new_vae().half().save_pretrained(folder / "vae")
    for name in NANO_VARIANTS:
        nano.new_transformer(name).half().save_pretrained(folder / transformer_part(name))
    return folder


class TestLayout:
    def test_all_together_stay_within_15_mb(self, parts: Path) -> None:
        total = sum(file.stat().st_size for file in parts.rglob("*") if file.is_file())
        assert total < 15e6

    @pytest.mark.parametrize("name", ["2b", "5b", "5b-i2v", "1.5-5b-i2v"])
    def test_plain_diffusers_loads_and_samples_it(self, parts: Path, name: str, tmp_path: Path) -> None:
        from diffusers import DiffusionPipeline
        from PIL import Image

        from cogtune.modeling.nano import write_nano
        from cogtune.models.checkpoint_configs import read_spec

        folder = write_nano(name, parts, tmp_path / name)
        spec = read_spec(folder)
        assert spec.variant.name == name
        assert str(spec.native) == "17x64x96"
        assert spec.size_problems(world.SIZE) == []
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        image = {"image": Image.new("RGB", (96, 64), "red")} if spec.image_to_video else {}
        latents = pipeline(
            prompt="a red disc",
            num_frames=17,
            height=64,
            width=96,
            num_inference_steps=2,
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **image,
        ).frames
        # the pipeline for 1.5 samples one latent frame more, for its patches of two, and drops it when it decodes
        assert latents.shape == (1, 6 if name.startswith("1.5") else 5, 16, 8, 12)
        assert torch.isfinite(latents).all()

    def test_a_part_that_is_missing_is_named(self, parts: Path, tmp_path: Path) -> None:
        from cogtune.modeling.nano import write_nano

        with pytest.raises(UsageError, match=r"unknown nano model '1\.5-5b'"):
            write_nano("1.5-5b", parts, tmp_path / "x")
        with pytest.raises(CogtuneError, match="has no tokenizer, text_encoder, vae, transformer-5b"):
            write_nano("5b", tmp_path, tmp_path / "x")
        assert not (tmp_path / "x").exists()

    @torch.no_grad()
    def test_latents_are_given_their_deviation_and_decode_to_the_same(self) -> None:
        from cogtune.modeling.nano import new_vae, normalise_latents

        vae = new_vae().eval()
        clips = world.draw_batch(world.training_scenes(0, range(2)), "cpu")[:, :, :9]
        before = vae.encode(clips).latent_dist
        decoded = vae.decode(before.mean).sample
        normalise_latents(vae, before.mean.transpose(0, 1).flatten(1).std(dim=1))
        after = vae.encode(clips).latent_dist
        assert after.mean.transpose(0, 1).flatten(1).std(dim=1) == pytest.approx(torch.full((16,), 1 / 0.7), rel=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
        # what is drawn from the posterior is scaled as its mean is
        assert torch.allclose(after.std / before.std, after.mean / before.mean, rtol=1e-2)


def test_a_lesson_shows_what_no_nano_model_has_seen(tmp_path: Path) -> None:
    data = draw_lesson(tmp_path / "data", clips=7, seed=3)
    dataset = read_dataset(data)
    assert (len(dataset.samples), dataset.findings) == (7, ())
    videos = [sample.video for sample in dataset.samples]
    readings = [detector.detect(read_frames(video, range(17))) for video in videos]
    assert {(found.colour, found.shape, found.motion) for found in readings} == {TAUGHT}
    assert [found.background for found in readings] == [*world.backgrounds_for("pink"), "black"]
    assert all("pink" in sample.caption for sample in dataset.samples)
    again = read_dataset(draw_lesson(tmp_path / "again", clips=7, seed=3)).samples
    assert [sample.video.read_bytes() for sample in again] == [video.read_bytes() for video in videos]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("2b", set()),
        ("5b-i2v", {"patch_embed.pos_embedding"}),
        (
            "1.5-5b-i2v",
            {"patch_embed.proj.weight", "proj_out.weight", "proj_out.bias"}
            | {f"ofs_embedding.linear_{number}.{part}" for number in (1, 2) for part in ("weight", "bias")},
        ),
    ],
)
def test_a_transformer_starts_from_another_variants(name: str, left: set[str], tmp_path: Path) -> None:
    from cogtune.modeling.nano import new_transformer
    from tools.nano.train_transformer import take_over

    known = new_transformer("5b", seed=1)
    known.save_pretrained(tmp_path)
    started = new_transformer(name)
    assert set(take_over(started, tmp_path)) == left
    for key, value in started.state_dict().items():
        if key == "patch_embed.proj.weight" and name == "5b-i2v":
            assert torch.equal(value[:, :16], known.state_dict()[key])
            assert not value[:, 16:].any(), "the image is ignored at first"
        elif key not in left:
            assert torch.equal(value, known.state_dict()[key]), key


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_the_scripts_make_a_model_and_go_on_where_they_were(tmp_path: Path) -> None:
    """All of tools/nano, a few steps each; what is done is left alone by the second call, what is missing is made."""
    parts = tmp_path / "nano"
    command = [sys.executable, "-m", "tools.nano.make", "--parts", parts, "--smoke", "--variants", "5b,5b-i2v"]
    command += ["--vae-batch-size", "2", "--vae-crop", "9x32x32"]
    environment = os.environ | {"COGTUNE_HOME": str(tmp_path / "home")}

    def made(*more: str) -> str:
        done = subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "left: 5b, 5b-i2v" in made("--until", "foundations", "--archive", str(tmp_path / "archive"))
    vae = json.loads((parts / "records" / "vae.json").read_text())
    assert vae["done"]
    assert vae["steps"] == 12
    assert set(vae["psnr"]) == {"known", "held out", "new"}
    made_before = (parts / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns

    parts.rename(tmp_path / "lost")
    shutil.copytree(tmp_path / "lost" / "data", parts / "data")
    told = made("--restore", str(tmp_path / "archive"), "--archive", str(tmp_path / "archive"))
    assert "nothing is left to do" in told
    assert "train_vae" not in told
    assert (parts / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns // 10**9 == made_before // 10**9
    record = json.loads((parts / "records" / "transformer-5b-i2v.json").read_text())
    assert (record["steps"], record["started_from"]) == (8, "transformer-5b")
    assert record["data"]["clips"] == 6
    assert set(record["files"]) == {"config.json", "diffusion_pytorch_model.safetensors"}
    score = json.loads((parts / "scores" / "5b-i2v.json").read_text())
    assert score["asked"] == 2
    assert score["first frame, dB"]["least"] > 0
    assert (parts / "scores" / "5b-i2v.png").is_file()
