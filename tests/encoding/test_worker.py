"""Filling the cache: decoders that die, disks that fill up, processes that share, and always the same bytes."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import psutil
import pytest
import torch

from cogtune.config.choices import DECODER_VARIABLE, Decoder
from cogtune.config.resolving import resolve
from cogtune.data.cache.index import ClipJob, EncodeJobs, TextJob, missing
from cogtune.data.frames import ClipView
from cogtune.data.sources import read_dataset
from cogtune.data.video import clips as video
from cogtune.data.video.stamp import stamp_of
from cogtune.encoding import jobs as caching
from cogtune.encoding import worker
from cogtune.encoding.decoders import MOST_HELD, DecodedJob, DecodeFailure, decoding, default_workers
from cogtune.encoding.jobs import EncodeOptions, EncodePlan, make_encode_plan, prepare, share
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.geometry import Size
from cogtune.system.errors import CogtuneError
from cogtune.system.pool import Pool
from tests.conftest import Cogtune
from tests.support.decoders import die_or_hang, speck
from tests.support.forked_workers import start_process
from tests.support.runs_in_process import Stop

pytestmark = pytest.mark.usefixtures("torch_forked")

Jobs = Callable[..., EncodePlan]


@pytest.fixture
def job(clips: Path, tiny: Callable[[str], Path], tmp_path: Path) -> Jobs:
    """The job of filling a cache with the drawn clips."""

    def made(model: str = "2b", *, cache: str = "cache", workers: int = 0, **flags: object) -> EncodePlan:
        flags = {"data": clips, "cache_dir": tmp_path / cache, "workers": workers, **flags}
        config = resolve(preset_name="cpu-lora-tiny", flags=flags).config.with_absolute_paths()
        spec = read_spec(tiny(model))
        prepared = prepare(config, spec, tiny(model), read_dataset(clips))
        return make_encode_plan(prepared, config, spec, tiny(model))

    return made


def encode(job: EncodePlan, after: int | None = None) -> worker.EncodeOutcome:
    return worker.encode(job, Stop(after))  # type: ignore[arg-type]


def entries(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.safetensors")}


def test_decoders_give_what_this_process_would_and_one_that_dies_takes_one_clip(job: Jobs) -> None:
    clips = job().todo.clips
    alone = {item.job.key: item.pixels for item in drain(clips, workers=0) if isinstance(item, DecodedJob)}
    assert len(alone) == 6
    found = drain(clips, workers=1, patience=6.0, load=die_or_hang)
    reasons = {item.job.video.name[:2]: item.reason for item in found if isinstance(item, DecodeFailure)}  # type: ignore[union-attr]
    assert reasons == {
        "01": "the decoder died of it (SIGSEGV)",
        "02": "decoding did not finish within 6 s",
        "03": "ZeroDivisionError: of its own",
    }
    others = [item for item in found if isinstance(item, DecodedJob)]
    assert len(others) == 3
    for item in others:
        assert item.pixels.dtype == torch.uint8
        assert torch.equal(item.pixels, alone[item.job.key])


def drain(jobs: tuple[ClipJob, ...], **options: object) -> list[DecodedJob | DecodeFailure]:
    with decoding(jobs, **options) as results:  # type: ignore[arg-type]
        return [item for item in results if item is not None]


def test_the_bytes_are_those_of_the_plain_path(job: Jobs) -> None:
    """Decoders in processes, two processes sharing, the writer behind: none of it shows in an entry."""
    plain, pooled, shared = (job("5b-i2v", cache=name) for name in ("plain", "pooled", "shared"))
    assert encode(plain).complete
    assert encode(replace(pooled, options=EncodeOptions(workers=1))).complete
    shared = replace(shared, options=EncodeOptions(processes=2, workers=0))
    outcomes = [worker.encode(shared, Stop(), rank=rank) for rank in range(2)]  # type: ignore[arg-type]
    assert sum(outcome.clips for outcome in outcomes) == 6
    expected = entries(plain.store.root)
    assert len(expected) == 6 + 7 + 6
    assert entries(pooled.store.root) == expected
    assert entries(shared.store.root) == expected


def test_entries_are_the_same_with_each_decoder(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the decoder belongs neither to their keys nor to a run's configuration."""
    read = []
    sound = video._open_decord
    monkeypatch.setattr(video, "_open_decord", lambda path: read.append(path) or sound(path))
    for decoder in get_args(Decoder):
        monkeypatch.setenv(DECODER_VARIABLE, decoder)
        assert encode(job(cache=decoder, skip_start=1)).complete
    found = [entries(job(cache=decoder, skip_start=1).store.root) for decoder in get_args(Decoder)]
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert found[0] == found[1] == found[2]
    assert len(read) == 6


def test_a_clip_that_cannot_be_decoded_is_named_after_the_others_are_stored(job: Jobs, tmp_path: Path) -> None:
    work = job()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no film at all" * 100)
    first = replace(work.todo.clips[0], video=broken)
    work = replace(work, todo=replace(work.todo, clips=(first, *work.todo.clips[1:])))
    outcome = encode(work)
    assert outcome.complete
    assert outcome.failures == [f"{broken}: {broken} is not a video"]
    assert outcome.clips == 5
    assert len(list((work.store.root / "latents").rglob("*.safetensors"))) == 5


def test_a_file_that_is_not_the_one_its_key_was_made_of_gets_no_entry(job: Jobs, tmp_path: Path) -> None:
    work = job("5b-i2v")
    path = tmp_path / "plan.json"
    work.write(path)
    again = EncodePlan.read(path)
    assert again.todo == work.todo
    assert [clip.stamp for clip in again.todo.clips] == [stamp_of(clip.video) for clip in work.todo.clips]
    size, modified, inode = stamp_of(work.todo.clips[0].video)
    others = [(size + 1, modified, inode), (size, modified + 1, inode), (size, modified, inode + 1)]
    clips = [replace(clip, stamp=stamp) for clip, stamp in zip(work.todo.clips[:1] * 3, others, strict=True)]
    image = replace(work.todo.images[0], stamp=others[2])
    outcome = encode(replace(work, todo=EncodeJobs(tuple(clips), (), (image,))))
    assert len(outcome.failures) == 4
    assert all("changed while it was being read" in failure for failure in outcome.failures)
    assert entries(work.store.root) == {}


def test_a_full_disk_is_told_and_leaves_whole_entries(job: Jobs) -> None:
    work = job()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # a caption's embedding is larger than that
    try:
        with pytest.raises(CogtuneError, match=r"cannot write .*safetensors: File too large"):
            encode(work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path for path in work.store.root.rglob("*") if path.is_file()] == [work.store.root / "files.json"]
    assert encode(work).complete


def test_a_disk_without_room_is_refused_with_figures(job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    work = job("5b-i2v")
    spec = read_spec(work.base_model_dir)
    caching.check_space(work, spec)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    with pytest.raises(CogtuneError, match=r"needs 6\d\d kB more, and 1 kB are free"):
        caching.check_space(work, spec)


def test_the_estimate_is_what_the_entries_take(job: Jobs) -> None:
    for precision in ("fp32", "bf16"):
        work = job("5b-i2v", cache=precision, precision=precision)
        estimate = caching.bytes_needed(work.todo, read_spec(work.base_model_dir), work.precision)
        encode(work)
        taken = sum(len(data) for data in entries(work.store.root).values())
        headers = 19 * caching._ENTRY_OVERHEAD
        assert estimate - headers < taken < estimate


def test_shares_cover_the_work_once_and_weigh_the_same() -> None:
    sizes = ("49x480x720", "25x512x512", "81x768x1360")
    views = [ClipView(tuple(range(size.num_frames)), size, (480, 720)) for size in map(Size.parse, sizes)]
    clips = tuple(ClipJob(f"{number:032x}", Path("a.mp4"), views[number % 3]) for number in range(300))
    texts = tuple(TextJob(f"{number:032x}", "a") for number in range(4000))
    work = EncodeJobs(clips, texts, ())
    parts = [share(work, rank, 4) for rank in range(4)]
    assert sorted(job.key for part in parts for job in part.clips) == [job.key for job in clips]
    assert sorted(job.key for part in parts for job in part.texts) == [job.key for job in texts]
    assert [len(part.texts) for part in parts] == [2000, 2000, 0, 0]  # not worth loading the encoder four times
    seconds = [caching.estimated_seconds(part) + (10 if part.texts else 0) for part in parts]
    assert max(seconds) - min(seconds) < 2.0
    assert [len(part.texts) for part in (share(EncodeJobs((), texts[:7], ()), rank, 4) for rank in range(4))] == [
        7,
        0,
        0,
        0,
    ]


def pool_behind(results: Any) -> Pool[Any, Any]:
    """The pool that gives what :func:`decoding` gives."""
    inner = results.gi_frame.f_locals[".0"]
    pool: Pool[Any, Any] = inner.gi_frame.f_locals["self"]
    return pool


def test_lookahead_is_bounded_by_file_handles(job: Jobs) -> None:
    """Each decoded clip that waits holds one, and a system may give a thousand."""
    many = job().todo.clips * 40
    with decoding(many, 1, limit=1 << 60, load=speck) as results:
        found = iter(results)
        before = next(found)
        pool = pool_behind(found)
        while pool.held < MOST_HELD:
            time.sleep(0.05)
        while pool.ready.qsize() < MOST_HELD - 1:
            time.sleep(0.05)
        assert psutil.Process().num_fds() < MOST_HELD + 100  # libraries, logs and pipes have some too
        assert pool.taken == MOST_HELD
        assert sum(item is not None for item in found) == len(many) - (before is not None)


def test_lookahead_is_bounded_by_bytes(job: Jobs) -> None:
    clips = job().todo.clips
    one = 3 * 9 * 64 * 96
    with decoding(clips, 1, limit=2 * one) as results:
        found = iter(results)
        time.sleep(0.1)
        pool = pool_behind(found)
        while pool.ready.qsize() < 2:
            time.sleep(0.05)
        time.sleep(0.3)
        assert pool.ready.qsize() == 2
        assert pool.taken == 2
        assert len(list(found)) == 6


def test_workers_are_chosen_from_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, expected in ((1, 1, 1), (2, 1, 1), (16, 1, 15), (128, 1, 16), (128, 8, 15), (16, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert default_workers(processes) == expected


def test_progress_tells_rate_rest_and_bottleneck(
    job: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0.0, 6.0)
    looks = SimpleNamespace(monotonic=lambda: next(clock))  # six seconds between any two
    monkeypatch.setattr("cogtune.system.console.time", looks)
    encode(job())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clips: ")]
    for line, place in zip(said, ("2/6, about 24 s", "4/6, about 12 s", "6/6, about 0 s"), strict=True):
        assert re.fullmatch(rf"clips: {place} left, [\d.]+ clips/s, mostly waiting for (de|en)coding", line)


@pytest.mark.slow
def test_two_processes_share_the_work(cogtune: Cogtune, clips: Path, tmp_path: Path) -> None:
    words = ["dataset", "cache", clips, "--preset", "cpu-lora-tiny", "--cache-dir", tmp_path / "cache"]
    told = cogtune(*words, "--num-processes", 2, "--workers", 0)
    assert "encoded 6 clips, 7 captions" in told.out
    ranks = [json.loads((tmp_path / "cache" / "job" / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert [rank["texts"] for rank in ranks] == [7, 0]
    assert [rank["clips"] for rank in ranks] == [0, 6]
    assert "nothing to do" in cogtune(*words).out


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_where_it_was(job: Jobs, tmp_path: Path) -> None:
    work = job("5b-i2v")
    path = work.store.root / "job" / "plan.json"
    work.write(path)
    moments = iter((1, 9, 14))  # entries that are there when the process is killed: captions, images, clips
    for count in moments:
        running = start_process(worker.main, [str(path)], log=tmp_path / "log")
        while sum(1 for _ in work.store.entries()) < count and running.is_alive():
            time.sleep(0.001)
        running.kill()
        running.join()
        assert [found for entry in work.store.entries() if (found := work.store.problem(entry.kind, entry.key))] == []
        left = missing(work.store, work.todo)
        assert len(left) == 19 - sum(1 for _ in work.store.entries())
        replace(work, todo=left).write(path)
    assert encode(replace(work, todo=missing(work.store, work.todo))).complete
    plain = job("5b-i2v", cache="plain")
    encode(plain)
    assert entries(work.store.root) == entries(plain.store.root)
