"""The cache: keys follow content, entries are whole, and only what changed is made again."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cogtune.config.resolving import resolve
from cogtune.data.cache.index import Index
from cogtune.data.cache.store import Store
from cogtune.data.sources import read_dataset
from cogtune.data.video.clips import write_video
from cogtune.encoding.jobs import EncodeOptions, PreparedCache, make_encode_plan, prepare
from cogtune.encoding.worker import encode
from cogtune.modeling.encoders import TextEncoder, VideoEncoder
from cogtune.models.checkpoint_configs import read_spec
from cogtune.system.errors import CogtuneError
from tests.support.runs_in_process import Stop, fill_here


@pytest.fixture
def data(clips: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clips, tmp_path / "data", ignore=shutil.ignore_patterns(".cogtune")))


@pytest.fixture
def look(data: Path, tiny: Callable[[str], Path]) -> Callable[..., PreparedCache]:
    """Prepare the dataset for a model, with flags."""

    def prepared(model: str = "2b", **flags: Any) -> PreparedCache:
        config = resolve(preset_name="cpu-lora-tiny", flags={"data": data, **flags}).config.with_absolute_paths()
        folder = tiny(model)
        return prepare(config, read_spec(folder), folder, read_dataset(data))

    return prepared


@pytest.fixture
def fill(data: Path, tiny: Callable[[str], Path], look: Callable[..., PreparedCache]) -> Callable[..., PreparedCache]:
    """Prepare, and encode what is missing, in this process."""

    def filled(model: str = "2b", **flags: Any) -> PreparedCache:
        prepared = look(model, **flags)
        config = resolve(preset_name="cpu-lora-tiny", flags={"data": data, **flags}).config.with_absolute_paths()
        job = make_encode_plan(prepared, config, read_spec(tiny(model)), tiny(model))
        fill_here(job)
        return prepared

    return filled


def counts(prepared: PreparedCache) -> tuple[int, int, int]:
    todo = prepared.todo
    return len(todo.clips), len(todo.texts), len(todo.images)


def test_entries_hold_what_training_reads(fill: Callable[..., PreparedCache]) -> None:
    prepared = fill("5b-i2v")
    row = prepared.index.rows[0]
    assert prepared.store.read("latents", row.latents).shape == (32, 3, 8, 12)
    assert prepared.store.read("text", row.text).shape == (226, 32)
    assert row.image is not None
    image = prepared.store.read("image", row.image)
    assert image.shape == (3, 64, 96)
    assert image.dtype == torch.uint8
    assert counts(prepared) == (6, 7, 6)  # a caption each, and the empty one


def test_entries_that_fit_are_read_once(tmp_path: Path) -> None:
    keys = ["aa" * 16, "bb" * 16, "cc" * 16]
    for number, key in enumerate(keys):
        Store(tmp_path).write("text", key, torch.full((4,), float(number)))
    store = Store(tmp_path, in_memory=40)  # two of 16 bytes each
    before = [store.read("text", key) for key in keys]
    for key in keys:
        Store(tmp_path).delete("text", key)
    assert all(torch.equal(store.read("text", key), value) for key, value in zip(keys[:2], before[:2], strict=True))
    with pytest.raises(CogtuneError, match="missing or damaged"):
        store.read("text", keys[2])
    with pytest.raises(CogtuneError, match="missing or damaged"):
        Store(tmp_path).read("text", keys[0])


def test_a_second_look_finds_nothing_to_do(
    fill: Callable[..., PreparedCache], look: Callable[..., PreparedCache]
) -> None:
    fill()
    again = look()
    assert not again.todo
    assert str(again.todo) == "nothing"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"size": "17x64x96"}, (6, 0, 0)),
        ({"size": "9x96x64"}, (6, 0, 0)),
        ({"fps": 4.0}, (6, 0, 0)),
        ({"fps": 16.0}, (5, 0, 0)),  # the clip of 8 frames a second is taken frame by frame in either case
        ({"frames": 17}, (6, 0, 0)),
        ({"skip_start": 1}, (6, 0, 0)),
        ({"skip_end": 3}, (0, 0, 0)),  # no clip's first nine frames are among its last three
        ({"sampling": "uniform"}, (6, 0, 0)),
        ({"reshape": "letterbox"}, (6, 0, 0)),
        ({"reshape": "stretch"}, (6, 0, 0)),
        ({"reshape": "random"}, (6, 0, 0)),
        ({"buckets": "9x64x96,9x96x64"}, (1, 0, 0)),  # the clip that is higher than wide
        ({"buckets": "9x64x96"}, (0, 0, 0)),
        ({"id_token": "sks"}, (0, 6, 0)),
        ({"precision": "bf16"}, (6, 7, 0)),
        ({"seed": 7, "rank": 3, "steps": 1}, (0, 0, 0)),
    ],
)
def test_a_setting_remakes_what_depends_on_it(
    fill: Callable[..., PreparedCache],
    look: Callable[..., PreparedCache],
    flags: dict[str, Any],
    expected: tuple[int, int, int],
) -> None:
    fill()
    assert counts(look(**flags)) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"frames": 17}, (6, 0, 0)),
        ({"fps": 4.0}, (6, 0, 0)),
        ({"sampling": "uniform"}, (6, 0, 0)),
        ({"skip_start": 1}, (6, 0, 6)),
        ({"reshape": "letterbox"}, (6, 0, 6)),
        ({"buckets": "9x64x96,17x64x96"}, (6, 0, 0)),
    ],
)
def test_the_conditioning_frame_depends_on_the_first_frame_alone(
    fill: Callable[..., PreparedCache],
    look: Callable[..., PreparedCache],
    flags: dict[str, Any],
    expected: tuple[int, int, int],
) -> None:
    fill("5b-i2v")
    assert counts(look("5b-i2v", **flags)) == expected


def test_an_image_of_its_own_depends_on_no_frame(
    data: Path, fill: Callable[..., PreparedCache], look: Callable[..., PreparedCache]
) -> None:
    for number in range(6):
        Image.new("RGB", (90, 90), (40 * number, 0, 0)).save(data / f"{number}.png")
    (data / "images.txt").write_text("".join(f"{number}.png\n" for number in range(6)))
    fill("5b-i2v")
    assert counts(look("5b-i2v", skip_start=1)) == (6, 0, 0)
    assert counts(look("5b-i2v", sampling="uniform")) == (6, 0, 0)
    assert counts(look("5b-i2v", reshape="stretch")) == (6, 0, 6)
    Image.new("RGB", (90, 90), (0, 200, 0)).save(data / "2.png")
    assert counts(look("5b-i2v")) == (0, 0, 1)


def test_a_random_start_remakes_the_clips_that_it_moves(
    fill: Callable[..., PreparedCache], look: Callable[..., PreparedCache]
) -> None:
    fill()
    made = [counts(look(sampling="random-start", seed=seed)) for seed in range(12)]
    assert max(made) == (6, 0, 0)  # a draw may be a clip's first frame, and then nothing has changed
    assert all(clips >= 3 and others == [0, 0] for clips, *others in made)


def test_draws_follow_the_seed_and_the_bytes_and_nothing_else(
    data: Path, fill: Callable[..., PreparedCache], look: Callable[..., PreparedCache]
) -> None:
    flags = {"sampling": "random-start", "reshape": "random"}
    fill(**flags)
    assert counts(look(**flags)) == (0, 0, 0)
    assert counts(look(**flags, seed=7)) == (6, 0, 0)
    names = (data / "videos.txt").read_text().splitlines()
    (data / names[0]).rename(data / "renamed.mp4")
    (data / "videos.txt").write_text("\n".join(["renamed.mp4", *names[1:]]))
    assert counts(look(**flags)) == (0, 0, 0)


def test_a_clip_of_the_sizes_own_shape_is_the_same_however_it_is_reshaped(
    data: Path, fill: Callable[..., PreparedCache], look: Callable[..., PreparedCache]
) -> None:
    first = data / (data / "videos.txt").read_text().splitlines()[0]
    write_video(first, torch.randint(0, 255, (30, 128, 192, 3), dtype=torch.uint8).numpy(), 8.0)
    fill()
    for way in ("letterbox", "stretch", "random"):
        todo = look(reshape=way).todo
        assert len(todo.clips) == 5
        assert first not in [job.video for job in todo.clips]


def test_only_what_changed_goes_through_the_encoder(
    fill: Callable[..., PreparedCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    start = VideoEncoder.start

    def counted(self: VideoEncoder, pixels: torch.Tensor) -> Any:
        shapes.append(tuple(pixels.shape))
        return start(self, pixels)

    monkeypatch.setattr(VideoEncoder, "start", counted)
    fill()
    assert shapes == [(9, 3, 64, 96)] * 6
    shapes.clear()
    buckets = "9x64x96,9x96x64"
    fill(buckets=buckets)
    assert shapes == [(9, 3, 96, 64)]
    shapes.clear()
    fill(buckets=f"{buckets},17x64x96")
    assert sorted(shapes) == [(17, 3, 64, 96)] * 5
    shapes.clear()
    fill(buckets=buckets)
    assert shapes == []


def test_either_encoder_is_called_for_what_was_edited_and_nothing_else(
    data: Path, fill: Callable[..., PreparedCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    start, encode = VideoEncoder.start, TextEncoder.encode

    def clip(self: VideoEncoder, pixels: torch.Tensor) -> Any:
        calls.append("clip")
        return start(self, pixels)

    def texts(self: TextEncoder, captions: Sequence[str]) -> torch.Tensor:
        calls.extend(captions)
        return encode(self, captions)

    monkeypatch.setattr(VideoEncoder, "start", clip)
    monkeypatch.setattr(TextEncoder, "encode", texts)

    def called(model: str = "2b", **flags: Any) -> tuple[int, list[str]]:
        calls.clear()
        fill(model, **flags)
        return calls.count("clip"), [call for call in calls if call != "clip"]

    captions = (data / "prompts.txt").read_text().splitlines()
    clips, texts_of_all = called()
    assert clips == 6
    assert sorted(texts_of_all) == sorted(["", *captions])
    assert called() == (0, [])
    (data / "prompts.txt").write_text("\n".join(["another caption", *captions[1:]]))
    assert called() == (0, ["another caption"])
    first = data / (data / "videos.txt").read_text().splitlines()[0]
    write_video(first, torch.randint(0, 255, (30, 64, 96, 3), dtype=torch.uint8).numpy(), 8.0)
    assert called() == (1, [])
    assert called(reshape="stretch")[1] == []
    assert called(frames=17) == (6, [])
    assert called("1.5-5b")[0] == 6


def test_an_edited_clip_is_noticed_and_no_other(
    data: Path, fill: Callable[..., PreparedCache], look: Callable[..., PreparedCache]
) -> None:
    fill()
    first = data / (data / "videos.txt").read_text().splitlines()[0]
    write_video(first, torch.randint(0, 255, (30, 64, 96, 3), dtype=torch.uint8).numpy(), 8.0)
    changed = look()
    assert [job.video for job in changed.todo.clips] == [first]
    assert counts(changed) == (1, 0, 0)


def test_an_edited_caption_is_noticed(
    data: Path, fill: Callable[..., PreparedCache], look: Callable[..., PreparedCache]
) -> None:
    fill()
    lines = (data / "prompts.txt").read_text().splitlines()
    (data / "prompts.txt").write_text("\n".join(["another caption", *lines[1:]]))
    changed = look()
    assert [job.caption for job in changed.todo.texts] == ["another caption"]
    assert counts(changed) == (0, 1, 0)


def test_another_models_entries_do_not_serve(
    fill: Callable[..., PreparedCache], look: Callable[..., PreparedCache]
) -> None:
    fill("2b")
    assert counts(look("1.5-5b"))[0] == 6


def test_two_clips_of_one_name_do_not_collide(data: Path, look: Callable[..., PreparedCache]) -> None:
    names = (data / "videos.txt").read_text().splitlines()
    (data / "other").mkdir()
    same_name = data / "other" / Path(names[0]).name
    shutil.copy(data / names[1], same_name)
    (data / "videos.txt").write_text("\n".join([*names, f"other/{same_name.name}"]))
    (data / "prompts.txt").write_text((data / "prompts.txt").read_text().rstrip("\n") + "\none more\n")
    rows = look().index.rows
    assert rows[6].latents == rows[1].latents != rows[0].latents


def test_a_damaged_entry_is_made_again(fill: Callable[..., PreparedCache], look: Callable[..., PreparedCache]) -> None:
    prepared = fill()
    row = prepared.index.rows[2]
    path = prepared.store.path("latents", row.latents)
    path.write_bytes(path.read_bytes()[:-1])
    assert not prepared.store.holds("latents", row.latents)
    assert [job.key for job in look().todo.clips] == [row.latents]
    with pytest.raises(CogtuneError, match="missing or damaged"):
        prepared.store.read("latents", row.latents)


def test_an_unchanged_file_is_not_read_twice(
    look: Callable[..., PreparedCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    look()

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("cogtune.data.cache.facts.digest_file", refuse)
    assert len(look().index.rows) == 6


def test_a_damaged_memory_of_digests_only_costs_time(data: Path, look: Callable[..., PreparedCache]) -> None:
    before = look().index
    (data / ".cogtune" / "files.json").write_text("{")
    assert look().index == before


def test_an_index_survives_the_disk(tmp_path: Path, look: Callable[..., PreparedCache]) -> None:
    index = look().index
    index.write(tmp_path / "index.json")
    assert Index.read(tmp_path / "index.json") == index
    assert Index.read(tmp_path / "index.json").digest == index.digest


def test_encoding_stops_when_asked_and_goes_on_later(
    data: Path, tiny: Callable[[str], Path], look: Callable[..., PreparedCache]
) -> None:
    prepared = look()
    config = resolve(preset_name="cpu-lora-tiny", flags={"data": data}).config.with_absolute_paths()
    job = make_encode_plan(prepared, config, read_spec(tiny("2b")), tiny("2b"))
    job = replace(job, options=EncodeOptions(workers=0))
    assert not encode(job, Stop(after=4)).complete  # type: ignore[arg-type]  # one for the captions, three for clips
    assert counts(look()) == (4, 0, 0)


def test_a_store_refuses_headers_that_lie(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path("text", "ab" * 16)
    path.parent.mkdir(parents=True)
    headers = (
        b"{}", b"[]", b"3", b"null", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": [1]}}',
        b'{"a": {"data_offsets": [0, "x"]}}', b'{"a": {"data_offsets": null}}', b"[" * 100_000, b"\xff\xfe",
    )  # fmt: skip
    lies = [len(header).to_bytes(8, "little") + header for header in headers]
    rubbish = random.Random(7).randbytes(2000)
    assert int.from_bytes(rubbish[:8], "little") > 2**60  # the length of its header, if it were one
    for content in (b"", b"\0" * 7, b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", rubbish, *lies):
        path.write_bytes(content)
        assert not store.holds("text", "ab" * 16)


def test_an_entry_is_what_was_written_or_is_not_read(tmp_path: Path) -> None:
    store, key = Store(tmp_path), "ab" * 16
    tensor = torch.randn(8, 3, 4, 6)
    store.write("latents", key, tensor)
    path, chance = store.path("latents", key), random.Random(2)
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged if chance.random() < 0.8 else damaged[: chance.randrange(len(whole))])
        try:
            assert torch.equal(store.read("latents", key), tensor)  # a name in the header that nobody reads
        except CogtuneError as error:
            refused += 1
            assert f"the cache entry {path} is missing or damaged: " in error.message  # noqa: PT017
            assert "--verify" in error.hint  # noqa: PT017
    assert refused > 180
    path.unlink()
    os.mkfifo(path)
    assert not store.holds("latents", key)
    with pytest.raises(CogtuneError, match="cannot read it"):
        store.read("latents", key)


def test_another_clips_entry_is_not_read_in_ones_place(tmp_path: Path) -> None:
    store, one, other = Store(tmp_path), "ab" * 16, "ac" * 16
    for number, key in enumerate((one, other)):
        store.write("latents", key, torch.full((2, 3), float(number)))
    shutil.copyfile(store.path("latents", one), store.path("latents", other))
    with pytest.raises(CogtuneError, match="checksum mismatch"):
        store.read("latents", other)
    assert store.problem("latents", other)
    assert float(store.read("latents", one)[0, 0]) == 0.0


def test_an_entry_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its checksum does not say of which key it is."""
    store, key, tensor = Store(tmp_path), "ab" * 16, torch.arange(6.0)
    path = store.path("text", key)
    path.parent.mkdir(parents=True)
    hasher = hashlib.blake2b(b"torch.float32 [6]", digest_size=16)
    hasher.update(tensor.numpy().tobytes())
    save_file({"data": tensor}, path, {"blake2b": hasher.hexdigest()})
    assert torch.equal(store.read("text", key), tensor)
