"""Resuming on another machine from the checkpoint that a push left on the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogtune.commands.resume import resume_from_hub
from cogtune.config.run_config import RunConfig
from cogtune.encoding import jobs
from cogtune.hub import push_checkpoints
from cogtune.hub.resume import fetch_checkpoint, find_checkpoint, is_repository
from cogtune.models.locate import locate
from cogtune.models.variants import LORA_WEIGHTS_NAME as LORA
from cogtune.run import launch
from cogtune.run.checkpoints import changed_files, checkpoints, read_state
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.json_files import sealed, write_json
from tests.hub.conftest import REPO
from tests.hub.test_watch import BRANCH, write_checkpoint
from tests.support import in_process
from tests.support.checkpoint_contents import differing, held
from tests.support.forked_workers import run_workers, start_forked
from tests.support.hub_server import Cut, Hub
from tests.support.runs_in_process import fill_here, plan_for, read_lines, start_here, train_here


@pytest.fixture
def pushed(hub: Hub, tmp_path: Path) -> Path:
    """The folder of a run whose checkpoint of step 10 is on the Hub."""
    run = tmp_path / "out"
    write_checkpoint(run, 10)
    (run / "run.yaml").write_text("model: 5b\n")
    push_checkpoints(run, REPO, every=0)
    return run


def fetch(output: Path, reference: str = REPO, *, overwrite: bool = False) -> Path:
    output.mkdir(exist_ok=True)
    return fetch_checkpoint(find_checkpoint(reference), output, overwrite=overwrite)[0]


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """A LoRA file's header, which the library writes in a new order each time, cogtune's facts in it but for the base
    model's path, and all bytes after it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    facts = json.loads(header["__metadata__"].pop("cogtune"))
    apart = ("base_model", "model_path", "checksum")
    return header, {key: value for key, value in facts.items() if key not in apart}, data[end:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "sft", "stream"])
def test_a_run_resumed_from_the_hub_is_the_one_resumed_from_disk_to_the_bit(
    hub: Hub, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kind: str
) -> None:
    """The first machine's run was stopped at step 2 of 4; the other one has data and model in other folders."""
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.setattr(launch, "start", start_here)
    first, disk, other = tmp_path / "first machine" / "out", tmp_path / "disk", tmp_path / "other"
    shutil.copytree(locate("tiny:2b"), first.parent / "model")
    flags: dict[str, Any] = {"checkpoint_every": 2, "ema": 0.9, "caption_dropout": 0.5, "eval_every": 2}
    flags |= {} if kind == "lora" else {"type": "sft"}
    flags |= {"strategy": "stream"} if kind == "stream" else {}
    train_here(plan_for(clips, first, model=str(first.parent / "model"), steps=4, **flags), stop_after=2)
    assert [path.name for path in checkpoints(first)] == ["checkpoint-2"]
    in_process.run(capsys, "push", first, REPO, "--every", 1)

    shutil.copytree(first, disk)
    shutil.copytree(clips, tmp_path / "clips", ignore=shutil.ignore_patterns(".cogtune"))
    shutil.copytree(first.parent / "model", tmp_path / "base")
    in_process.run(capsys, "train", "--resume", "latest", "--output", disk)
    words = ["--output", other, "--data", tmp_path / "clips", "--model", tmp_path / "base"]
    done = in_process.run(capsys, "train", "--resume", REPO, *words)
    assert f"downloaded checkpoint-2 of {REPO}" in " ".join(done.err.split())

    for name in (LORA, f"ema/{LORA}", f"checkpoint-4/{LORA}", f"checkpoint-4/ema/{LORA}") if kind == "lora" else ():
        assert opened(other / name) == opened(disk / name), name
    contents = held(disk / "checkpoint-4")
    assert differing(contents, held(other / "checkpoint-4")) == []
    assert differing(contents, held(first / "checkpoint-2")) != []
    assert read_lines(other) == read_lines(disk)  # from the first step on
    assert not list(other.glob(".hub-*"))
    assert f"# --resume {REPO}" in (other / "run.yaml").read_text()
    pushed = b"".join(hub.repositories[REPO].files(BRANCH).values())
    for text in (b"first machine", str(clips).encode()):
        assert text not in pushed + (other / "run.yaml").read_bytes()
    push_checkpoints(other, REPO, every=0)  # and the other machine's run can be lost, too
    assert find_checkpoint(REPO).step == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_so_is_a_zero_run_of_two_processes(
    hub: Hub, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    monkeypatch.setattr(launch, "start", start_forked)
    first, disk, other = tmp_path / "first", tmp_path / "disk", tmp_path / "other"
    run_workers(plan_for(clips, first, steps=4, num_processes=2, strategy="zero2", checkpoint_every=2))
    whole = held(first / "checkpoint-4")
    shutil.rmtree(first / "checkpoint-4")  # as if the machine was lost before it was there
    push_checkpoints(first, REPO, every=0)
    sent = hub.repositories[REPO].files(BRANCH)
    assert len([path for path in sent if "optim_states" in path]) == 2
    assert not [path for path in sent if path.endswith(".py")]
    shutil.copytree(first, disk)
    in_process.run(capsys, "train", "--resume", "latest", "--output", disk)
    ran = in_process.run(capsys, "train", "--resume", REPO, "--output", other, "--data", clips)
    assert f"downloaded checkpoint-2 of {REPO}" in " ".join(ran.err.split())
    assert differing(held(disk / "checkpoint-4"), whole) == []
    assert differing(held(other / "checkpoint-4"), whole) == []
    assert read_lines(other) == read_lines(disk)


def test_a_checkpoint_arrives_as_it_was_pushed(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    folder = fetch(tmp_path / "other")
    assert folder == tmp_path / "other" / "checkpoint-10"
    files = hub.repositories[REPO].files(BRANCH)
    assert {f"checkpoint-10/{path.name}": path.read_bytes() for path in folder.iterdir()} == {
        path: data for path, data in files.items() if path.startswith("checkpoint-10/")
    }
    assert len(read_lines(tmp_path / "other")) == 10
    before = len(hub.requests)
    assert fetch(tmp_path / "other") == folder  # the same command again
    assert not [line for line in hub.requests[before:] if "optimizer" in line]
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["checkpoint-10", "metrics.jsonl"]


@pytest.mark.parametrize("when", ["before", "answering", "after"])
@pytest.mark.parametrize("name", ["optimizer.pt", LORA, "state.json"])
def test_a_download_that_breaks_off_leaves_no_checkpoint_and_continues(
    hub: Hub, pushed: Path, tmp_path: Path, name: str, when: Any
) -> None:
    hub.cut = Cut(f"GET /.*/resolve/.*/{name}", when)
    with pytest.raises(CogtuneError, match=f"cannot download the checkpoint of {REPO}") as caught:
        fetch(tmp_path / "other")
    assert "run the same command again to continue" in caught.value.hint
    assert checkpoints(tmp_path / "other") == []
    hub.cut = None
    before = len(hub.requests)
    folder = fetch(tmp_path / "other")
    assert changed_files(folder, read_state(folder)) == []
    again = [line for line in hub.requests[before:] if line.startswith("GET") and line.endswith("state.json")]
    assert len(again) == (name == "state.json")  # what had arrived is not sent twice


def altered(hub: Hub, change: Callable[[dict[str, bytes]], object]) -> None:
    """Change what is on the Hub."""
    change(hub.repositories[REPO].files(BRANCH))


def with_files(pushed: Path, hub: Hub, **files: str) -> None:
    """Let the state on the Hub list more files, with a checksum that fits."""
    path = "checkpoint-10/state.json"
    state = json.loads(hub.repositories[REPO].files(BRANCH)[path])
    del state["checksum"]
    state["files"] |= files
    write_json(pushed / "altered.json", sealed(state))
    hub.repositories[REPO].files(BRANCH)[path] = (pushed / "altered.json").read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.safetensors",
        "/etc/passwd",
        "notes.txt",
        "transformer/../../x.safetensors",
        "model.py",
        "zero_to_fp32.py",
        "pytorch_model/../latest.pt",
        "transformer/diffusion_pytorch_model.bin",
        "ema/optimizer.pt",
        "optimizer.pt\n",
        f"stream-state-{chr(0x661)}.safetensors",  # a digit, though not an ASCII one
    ],
)
def test_only_files_of_a_checkpoint_are_downloaded(hub: Hub, pushed: Path, tmp_path: Path, name: str) -> None:
    with_files(pushed, hub, **{name: "0"})
    altered(hub, lambda files: files.update({f"checkpoint-10/{name}": b"evil"}))
    with pytest.raises(CogtuneError) as caught:
        fetch(tmp_path / "other")
    assert "cannot be used" in caught.value.message
    assert "is not a file of a checkpoint" in caught.value.details[0]
    assert not [line for line in hub.requests if "evil" in line or "passwd" in line]
    assert checkpoints(tmp_path / "other") == []
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"] == []


def test_damaged_and_incomplete_checkpoints_are_refused(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    good = dict(hub.repositories[REPO].files(BRANCH))
    weights = good[f"checkpoint-10/{LORA}"]
    altered(hub, lambda files: files.update({f"checkpoint-10/{LORA}": weights[:-1] + b"\x01"}))
    with pytest.raises(CogtuneError, match="is damaged") as caught:
        fetch(tmp_path / "other")
    assert caught.value.details == (f"{LORA} is not the file that was saved with this checkpoint",)
    altered(hub, lambda files: files.pop(f"checkpoint-10/{LORA}"))
    with pytest.raises(CogtuneError, match="cannot be used") as caught:
        fetch(tmp_path / "other")
    assert caught.value.details == (f"{LORA} is missing",)
    state = good["checkpoint-10/state.json"].replace(b'"step": 10', b'"step": 11')
    altered(hub, lambda files: files.update(good | {"checkpoint-10/state.json": state}))
    with pytest.raises(CogtuneError, match="checksum mismatch"):
        fetch(tmp_path / "other")
    assert checkpoints(tmp_path / "other") == []
    altered(hub, lambda files: files.update(good))
    assert fetch(tmp_path / "other").is_dir()


def test_a_link_in_the_output_is_not_written_through(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "other" / f".hub-{find_checkpoint(REPO).commit[:16]}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CogtuneError, match="is a link to"):
        fetch(tmp_path / "other")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_another_checkpoint_of_that_step_is_replaced_only_when_asked(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    mine = write_checkpoint(tmp_path / "other", 10, seed=1)
    before = (mine / LORA).read_bytes()
    with pytest.raises(UsageError, match="is not the checkpoint in"):
        fetch(tmp_path / "other")
    assert (mine / LORA).read_bytes() == before
    fetch(tmp_path / "other", overwrite=True)
    assert (mine / LORA).read_bytes() == hub.repositories[REPO].files(BRANCH)[f"checkpoint-10/{LORA}"]


def test_where_a_checkpoint_is_looked_for(hub: Hub, pushed: Path) -> None:
    repository = hub.repositories[REPO]
    assert find_checkpoint(f"{REPO}@{BRANCH}").commit == find_checkpoint(REPO).commit == repository.sha(BRANCH)
    assert find_checkpoint(f"{REPO}@{repository.sha(BRANCH)}").step == 10
    with pytest.raises(CogtuneError, match=f"{REPO}@main contains no checkpoint to resume from"):
        find_checkpoint(f"{REPO}@main")
    with pytest.raises(CogtuneError, match="has no revision 'typo'"):
        find_checkpoint(f"{REPO}@typo")
    with pytest.raises(CogtuneError, match="does not exist on the Hub"):
        find_checkpoint("anna/nothing")
    repository.branches["main"] = [dict(repository.files(BRANCH))]
    del repository.branches[BRANCH]
    assert find_checkpoint(REPO).step == 10


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("anna/boats", True),
        ("anna/boats@main", True),
        ("latest", False),
        ("out/checkpoint-5", False),
        ("./anna/boats", False),
        ("/anna/boats", False),
        ("here/boats", False),
        ("", False),
    ],
)
def test_what_means_a_repository(
    reference: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_repository(reference) == expected


def test_words_of_the_command(hub: Hub, pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["--resume", REPO, "--output", tmp_path / "other"]
    told = in_process.run(capsys, "train", *other, status=2).err
    assert f"--resume {REPO} requires --data" in " ".join(told.split())
    told = in_process.run(capsys, "train", *other, "--data", tmp_path, "--machine-rank", 1, status=2).err
    assert "only machine 0 can resume from the Hub" in told
    assert not (tmp_path / "other").exists()
    write_checkpoint(tmp_path / "other", 30)
    told = in_process.run(capsys, "train", *other, "--data", tmp_path, status=2).err
    assert "holds checkpoint-30" in " ".join(told.split())
    assert not (tmp_path / "other" / "checkpoint-10").exists()


@pytest.mark.parametrize("commit", ["/../../data", "../../../x", "", "A" * 40])
def test_a_commit_that_is_a_path_is_refused(
    hub: Hub, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    """A download is kept in a folder that the commit names, which is deleted in the end."""
    monkeypatch.setattr(type(hub.repositories[REPO]), "sha", lambda *_: commit)
    (tmp_path / "data").mkdir()
    with pytest.raises(CogtuneError, match=r"the server's answer .* is invalid|contains no checkpoint"):
        fetch(tmp_path / "other")
    assert (tmp_path / "data").is_dir()
    assert list((tmp_path / "other").iterdir()) == []


def test_settings_from_the_hub_name_no_path_or_address(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    """A run.yaml that somebody uploaded by hand decides neither what is read here, nor who is connected to."""
    (tmp_path / "mine.txt").write_text("of mine\n")
    evil = {
        "model": str(tmp_path),
        "validation_prompts": str(tmp_path / "mine.txt"),
        "validation_images": str(tmp_path / "mine.txt"),
        "allow_outside": True,
        "main_process_ip": "192.0.2.1",
        "main_process_port": 22,
        "rank": 7,
    }
    for prompts in (evil["validation_prompts"], "mine.txt", "~/mine.TXT"):
        text = yaml.safe_dump(evil | {"validation_prompts": prompts}).encode()
        hub.repositories[REPO].files(BRANCH)["run.yaml"] = text
        flags = {"data": tmp_path, "output": tmp_path / "other"}
        config = resume_from_hub(REPO, preset_name=None, file=None, flags=flags, overwrite=True)[0].config
        assert config.rank == 7
        for key in evil.keys() - {"rank"}:
            assert getattr(config, key) == RunConfig.model_fields[key].default, key


def test_the_address_of_a_machine_is_not_published(hub: Hub, tmp_path: Path) -> None:
    run = tmp_path / "out"
    write_checkpoint(run, 10)
    path = run / "checkpoint-10" / "state.json"
    state = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "checksum"}
    state["config"] = {**state.get("config", {}), "main_process_ip": "192.0.2.1", "model": "5b"}
    write_json(path, sealed(state))
    (run / "run.yaml").write_text("model: 5b\nmain_process_ip: 192.0.2.1\n")
    push_checkpoints(run, REPO, every=0)
    assert b"192.0.2.1" not in b"".join(hub.repositories[REPO].files(BRANCH).values())
