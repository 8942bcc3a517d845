"""Looking after a cache: what is in it, what is damaged, what nobody needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogtune.bench.caching import bench_cache
from cogtune.cli import main
from cogtune.commands import cache, train
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.data.cache.store import KINDS, Store
from cogtune.data.video.clips import probe
from cogtune.encoding import jobs as caching
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.gpus import Gpu
from cogtune.system.locks import exclusive_folder
from tests.support.runs_in_process import fill_here

Configured = Callable[..., RunConfig]


@pytest.fixture
def configured(clips: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Configured:
    """A configuration over a copy of the drawn clips; entries are made in this process."""
    data = shutil.copytree(clips, tmp_path / "data", ignore=shutil.ignore_patterns(".cogtune"))
    monkeypatch.setattr(caching, "fill_cache", fill_here)

    def made(**flags: Any) -> RunConfig:
        return resolve(preset_name="cpu-lora-tiny", flags={"data": data, "model": "tiny:1.5-5b-i2v", **flags}).config

    return made


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_status_tells_what_is_there_and_writes_nothing(configured: Configured, tmp_path: Path) -> None:
    before = files(tmp_path)
    empty = cache.look(configured())
    assert files(tmp_path) == before
    assert {name: (part.cached, part.missing, part.size) for name, part in empty.parts.items()} == {
        "clips": (0, 6, 0), "captions": (0, 7, 0), "images": (0, 6, 0),
    }  # fmt: skip
    cache.fill(configured())
    before = files(tmp_path)
    full = cache.look(configured())
    assert files(tmp_path) == before
    assert full.complete
    size = {kind: sum(path.stat().st_size for path in (full.root / kind).rglob("*.safetensors")) for kind in KINDS}
    assert [part.size for part in full.parts.values()] == list(size.values())
    assert full.others == 0
    other = cache.look(configured(size="17x64x96"))
    assert {name: (part.cached, part.missing) for name, part in other.parts.items()} == {
        "clips": (0, 6), "captions": (7, 0), "images": (6, 0),
    }  # fmt: skip
    assert (other.others, other.others_size) == (6, size["latents"])
    assert not other.complete


def test_verify_finds_every_kind_of_damage_and_the_next_run_mends_it(configured: Configured) -> None:
    store = Store(cache.fill(configured()).root)
    sound = files(store.root)
    assert cache.verify(configured()) == (19, [])
    latents, texts, images = (sorted((store.root / kind).rglob("*.safetensors")) for kind in KINDS)
    flipped = bytearray(latents[0].read_bytes())
    flipped[-1000] ^= 1
    latents[0].write_bytes(flipped)
    latents[1].write_bytes(latents[1].read_bytes()[:-1])
    store.write("latents", latents[2].stem, load_file(latents[2])["data"][:, :1])
    store.write("text", texts[0].stem, torch.full_like(load_file(texts[0])["data"], torch.nan))
    save_file(load_file(texts[1]), texts[1])  # whole, but nobody's word for it
    images[0].write_bytes(b"")
    checked, damaged = cache.verify(configured())
    assert checked == 19
    found = dict(damaged)
    assert found.keys() == {*latents[:3], *texts[:2], images[0]}
    assert found[latents[0]] == found[texts[1]] == "checksum mismatch"
    assert found[latents[2]] == "its shape is [32, 1, 8, 12], not [32, 3, 8, 12]"
    assert found[texts[0]] == "it has values that are not finite"
    assert not any(path.exists() for path in found)
    again = cache.fill(configured())
    assert str(again.done) == "3 clips, 2 captions, 1 image"
    assert files(store.root) == sound
    assert cache.verify(configured()) == (19, [])


def test_prune_keeps_what_this_configuration_uses_and_nothing_else(configured: Configured) -> None:
    store = Store(cache.fill(configured()).root)
    kept = {name for name in files(store.root) if name.endswith(".safetensors")}
    assert cache.unused(configured())[1] == []
    cache.fill(configured(size="17x64x96", id_token="sks"))
    (store.root / "text" / "ab").mkdir(exist_ok=True)
    (store.root / "text" / "ab" / ".abc.safetensors.1-2.partial").write_bytes(b"half")
    unused = cache.unused(configured())[1]
    assert sorted(entry.kind for entry in unused) == ["latents"] * 6 + ["text"] * 6
    with exclusive_folder(store.root), pytest.raises(CogtuneError, match="another process is using"):
        cache.delete(store, unused)
    cache.delete(store, unused)
    left = {name for name in files(store.root) if "/" in name and not name.startswith("job/")}
    assert left == kept
    assert not cache.fill(configured()).done


def test_a_cache_that_is_not_there_is_told(configured: Configured, tmp_path: Path) -> None:
    for ask in (cache.verify, cache.unused):
        with pytest.raises(CogtuneError, match="no cache in"):
            ask(configured(cache_dir=tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_the_commands_print_it(configured: Configured, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cache.fill(configured())
    words = ["dataset", "cache", str(tmp_path / "data"), "--preset", "cpu-lora-tiny", "--model", "tiny:1.5-5b-i2v"]

    def said(*more: str, status: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([*words, *more])
        assert end.value.code == status
        return capsys.readouterr().out

    assert "clips\t6\t0\t" in said("--status")
    assert json.loads(said("--status", "--json"))["captions"]["cached"] == 7
    store = Store(tmp_path / "data" / ".cogtune")
    entry = next(store.entries())
    path = store.path(entry.kind, entry.key)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: cannot read it" in said("--verify", status=1)
    assert said("--verify").endswith("18 entries read, 0 damaged\n")
    assert json.loads(said("--verify", "--json")) == {"entries": 18, "damaged": []}
    told = said("--prune", "--id-token", "sks")
    assert "6 entries in" in told
    assert told.endswith("nothing was deleted; pass --yes to delete them\n")
    assert json.loads(said("--prune", "--id-token", "sks", "--json"))["deleted"] is False
    assert said("--prune", "--id-token", "sks", "--yes").endswith("deleted\n")
    assert "0 entries in" in said("--prune", "--id-token", "sks", "--yes")
    assert said("--status", "--prune", status=2) == ""
    assert said("--yes", status=2) == ""


def test_more_processes_than_gpus_are_refused(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = tuple(Gpu("card", 12 << 30, 0) for _ in range(2))
    monkeypatch.setattr(cache, "gpus", lambda: cards)
    monkeypatch.setattr(caching, "gpus", lambda: cards)
    with pytest.raises(UsageError, match=r"--num-processes 3 is more than the number of GPUs \(2\)"):
        cache.fill(configured(), processes=3)
    jobs: list[caching.EncodePlan] = []
    monkeypatch.setattr(caching, "fill_cache", lambda job: jobs.append(job) or [])
    cache.fill(configured())
    cache.fill(configured(), processes=2)
    monkeypatch.setattr(caching, "estimated_seconds", lambda work: 1000.0)
    cache.fill(configured())
    train.prepare_run(
        resolve(preset_name="cpu-lora-tiny", flags={**configured().model_dump(exclude_unset=True), "num_processes": 4}),
        resume=None, overwrite=False, dry_run=False,
    )  # fmt: skip
    assert [job.options.processes for job in jobs] == [1, 2, 2, 2]


@pytest.mark.slow
def test_the_bench_measures_the_real_thing(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "fill_cache", fill_here)
    config = resolve(flags={"model": "tiny:5b-i2v", "size": "9x64x96", "precision": "fp32"}).config
    figures = bench_cache(config, clips=5, processes=1, keep=tmp_path)
    assert (figures["clips"], figures["texts"], figures["images"]) == (5, 6, 5)  # all clips are different files
    assert figures["clips_per_second"] > 0
    assert 0 < figures["device_busy"] < 1
    assert {path.name for path in tmp_path.iterdir()} == {"5b-i2v-tiny", "data-9x64x96-5"}
    info = probe(tmp_path / "data-9x64x96-5" / "0003.mp4")
    assert (info.num_frames, info.fps, info.height, info.width) == (25, 24.0, 96, 144)


@pytest.mark.slow
def test_the_bench_encodes_with_the_weights_of_a_nano_model(
    tmp_path: Path, nano: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[Path] = []

    def fill(job: caching.EncodePlan) -> list[dict[str, Any]]:
        bases.append(job.base_model_dir)
        return fill_here(job)

    monkeypatch.setattr(caching, "fill_cache", fill)
    config = resolve(flags={"model": "nano:5b", "precision": "fp32"}).config
    figures = bench_cache(config, clips=2, processes=1, keep=tmp_path)
    assert (figures["clips"], figures["texts"], figures["model"], figures["size"]) == (2, 3, "nano:5b", "17x64x96")
    assert bases == [nano("5b")]
    assert {path.name for path in tmp_path.iterdir()} == {"data-17x64x96-2"}
