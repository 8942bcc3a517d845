"""Pushing the checkpoints of a running training: the loop, against a local server."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cogtune.config.resolving import resolve
from cogtune.hub import push_checkpoints
from cogtune.models.variants import LORA_WEIGHTS_NAME as LORA
from cogtune.run.checkpoints import changed_files, fingerprints, lora_facts, read_state
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.system.folders import remove_folder
from cogtune.system.json_files import write_sealed
from cogtune.system.locks import exclusive_folder
from tests.hub.conftest import READER, REPO, TOKEN
from tests.support import in_process
from tests.support.hub_server import Cut, Hub

BRANCH = "checkpoints"


def write_checkpoint(run: Path, step: int, *, seed: int = 0) -> Path:
    """A checkpoint as training writes it, but of small weights."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    config = resolve(flags={"model": "5b", "rank": 4, "data": "/home/anna/clips", "output": str(run)}).config
    facts: dict[str, Any] = {
        "format": 1,
        "variant": "5b",
        "base_model": "/home/anna/CogVideoX-5b",
        "model_path": "/home/anna/CogVideoX-5b",
        "dataset": {"samples": 70, "digest": "0a1b2c3d"},
        "identity": {"rank": 4, "data": "0a1b2c3d"},
        "step": step,
    }
    name = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_{part}.weight": np.full((4, 4), step + seed, np.float32) for part in "AB"}
    save_file(tensors, folder / LORA, {"cogtune": lora_facts(facts, "")})
    with zipfile.ZipFile(folder / "optimizer.pt", "w") as archive:
        archive.writestr("data", f"moments of step {step}")
    state = {
        **facts,
        "config": config.to_dict(),
        "files": fingerprints([folder / LORA, folder / "optimizer.pt"], folder),
    }
    write_sealed(folder / "state.json", state)
    lines = (json.dumps({"step": done, "loss": 1 / done}) + "\n" for done in range(1, step + 3))
    (run / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run without a checkpoint, which no process is using."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.yaml").write_text("model: 5b\n")
    return out


class Script:
    """A run: whenever the loop waits, the next thing happens, and after the last one the run ends."""

    def __init__(self, run: Path, *steps: Callable[[], object]) -> None:
        self._left, self._lock = list(steps), contextlib.ExitStack()
        self._lock.enter_context(exclusive_folder(run))
        self.waited: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.waited.append(seconds)
        if self._left:
            self._left.pop(0)()
        else:
            self._lock.close()


def tree(hub: Hub) -> list[str]:
    return sorted(path for path in hub.repositories[REPO].files(BRANCH) if path != ".gitattributes")


def names_of(step: int) -> list[str]:
    own = [f"checkpoint-{step}/{name}" for name in ("optimizer.pt", LORA, "state.json")]
    return [*own, "metrics.jsonl", "run.yaml"]


def test_each_checkpoint_replaces_the_one_before_until_the_run_has_ended(hub: Hub, run: Path) -> None:
    seen: list[list[str]] = []

    def second() -> None:
        seen.append(tree(hub))
        write_checkpoint(run, 20)
        remove_folder(run / "checkpoint-10")

    def third() -> None:
        seen.append(tree(hub))
        write_checkpoint(run, 30)

    script = Script(run, lambda: write_checkpoint(run, 10), second, third)
    url, steps = push_checkpoints(run, REPO, every=0, private=True, pause=script)
    assert steps == [10, 20, 30]
    assert url.endswith(f"/{REPO}/tree/{BRANCH}")
    assert seen == [names_of(10), names_of(20)]
    assert tree(hub) == names_of(30)
    repository = hub.repositories[REPO]
    assert repository.private
    assert len(repository.branches[BRANCH]) == 1  # no commit keeps the old ones
    assert repository.commits() == 0  # main is for what is published
    assert not list(run.glob(".push-*"))


def test_what_is_pushed_is_a_checkpoint_without_what_is_private(hub: Hub, run: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(run, 10)
    push_checkpoints(run, REPO, every=0)
    files = hub.repositories[REPO].files(BRANCH)
    assert b"anna/" not in b"".join(files.values()).replace(REPO.encode(), b"")
    assert str(tmp_path).encode() not in b"".join(files.values())
    copy = tmp_path / "copy" / "checkpoint-10"
    copy.mkdir(parents=True)
    for path, data in files.items():
        if path.startswith("checkpoint-10/"):
            (copy.parent / path).write_bytes(data)
    state = read_state(copy)
    assert changed_files(copy, state) == []
    assert state["identity"] == read_state(checkpoint)["identity"]
    assert state["dataset"] == {"samples": 70, "digest": "0a1b2c3d"}
    assert (copy / "optimizer.pt").read_bytes() == (checkpoint / "optimizer.pt").read_bytes()
    assert (copy / LORA).read_bytes()[-128:] == (checkpoint / LORA).read_bytes()[-128:]
    assert [json.loads(line)["step"] for line in files["metrics.jsonl"].splitlines()] == list(range(1, 11))
    assert b"rank: 4" in files["run.yaml"]


@pytest.mark.parametrize("place", ["POST /api/repos/create", "PUT /blobs/.*", "POST /api/models/.*/commit/.*"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cut_connection_is_reported_and_the_push_repeated(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], place: str, when: Any
) -> None:
    write_checkpoint(run, 10)
    hub.cut = Cut(place, when)

    def mend() -> None:
        hub.cut = None

    script = Script(run, lambda: None, lambda: None, mend)
    assert push_checkpoints(run, REPO, every=0, pause=script)[1] == [10]
    assert tree(hub) == names_of(10)
    told = " ".join(capsys.readouterr().err.split())
    assert f"the upload to {REPO} was interrupted; trying again in 15 seconds" in told
    if when == "before":
        assert script.waited[:3] == [15, 30, 60]
    assert len(hub.repositories[REPO].branches[BRANCH]) == 1


def test_a_run_that_has_ended_is_not_waited_for_without_end(hub: Hub, run: Path) -> None:
    write_checkpoint(run, 10)
    hub.cut = Cut("PUT /blobs/.*", "before")
    waited: list[float] = []
    with pytest.raises(CogtuneError, match="was interrupted") as caught:
        push_checkpoints(run, REPO, every=0, pause=waited.append)
    assert "run the same command again to continue" in caught.value.hint
    assert len(waited) == 9
    assert max(waited) == 300
    hub.cut = None
    assert push_checkpoints(run, REPO, every=0)[1] == [10]


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_pushed_all_the_same(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(run, 10)
    lookup = dict.__contains__

    class Deleting(dict[str, str]):
        """Whom the server knows; when it is asked while files arrive, the run deletes its checkpoint."""

        def __contains__(self, token: object) -> bool:
            if BRANCH in getattr(hub.repositories.get(REPO), "branches", ()) and (run / "checkpoint-10").exists():
                remove_folder(run / "checkpoint-10")
            return lookup(self, token)

    monkeypatch.setattr(hub, "users", Deleting(hub.users))
    script = Script(run, lambda: None)
    assert push_checkpoints(run, REPO, every=0, pause=script)[1] == [10]
    assert not (run / "checkpoint-10").exists()
    assert tree(hub) == names_of(10)


def test_a_damaged_checkpoint_does_not_replace_a_good_one(hub: Hub, run: Path) -> None:
    write_checkpoint(run, 10)
    push_checkpoints(run, REPO, every=0)
    damaged = write_checkpoint(run, 20) / LORA
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CogtuneError, match="checkpoint-20 is damaged and was not pushed"):
        push_checkpoints(run, REPO, every=0)
    assert tree(hub) == names_of(10)


def test_an_earlier_checkpoint_does_not_replace_a_later_one(hub: Hub, run: Path, tmp_path: Path) -> None:
    write_checkpoint(run, 20)
    push_checkpoints(run, REPO, every=0)
    write_checkpoint(tmp_path / "other", 10)
    (tmp_path / "other" / "run.yaml").write_text("model: 5b\n")
    with pytest.raises(CogtuneError, match="contains a checkpoint of step 20, later than this one of step 10"):
        push_checkpoints(tmp_path / "other", REPO, every=0)
    assert tree(hub) == names_of(20)


def test_only_files_that_a_resume_needs_are_pushed(hub: Hub, run: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(run, 10)
    (folder / "notes.txt").write_text("private")
    push_checkpoints(run, REPO, every=0)
    assert tree(hub) == names_of(10)
    (tmp_path / "id_rsa").write_text("private")
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CogtuneError, match="is a link to"):
        push_checkpoints(run, "anna/other", every=0)
    (folder / "optimizer.pt").unlink()
    state = read_state(folder)
    write_sealed(folder / "state.json", {**state, "files": {**state["files"], "notes.txt": "0"}})
    with pytest.raises(CogtuneError, match="contains files that no resume needs"):
        push_checkpoints(run, "anna/other", every=0)


def test_the_shards_of_a_zero_run_are_pushed_without_scripts(hub: Hub, run: Path) -> None:
    folder = write_checkpoint(run, 10)
    state = read_state(folder)
    shards = ("latest", "zero_to_fp32.py", "pytorch_model/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    for name in shards:
        (folder / name).parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data", name)
    files = {**state["files"], **fingerprints([folder / name for name in shards], folder)}
    write_sealed(folder / "state.json", {**state, "files": files})
    push_checkpoints(run, REPO, every=0)
    wanted = [name for name in shards if not name.endswith(".py")]
    assert set(tree(hub)) == {*names_of(10), *(f"checkpoint-10/{name}" for name in wanted)}
    published = json.loads(hub.repositories[REPO].files(BRANCH)["checkpoint-10/state.json"])["files"]
    assert set(published) == {*state["files"], *wanted}


def test_the_command(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no checkpoint to push" in in_process.run(capsys, "push", run, REPO, "--every", 5, status=1).err
    write_checkpoint(run, 10)
    done = in_process.run(capsys, "push", run, REPO, "--every", 5, "--dry-run")
    assert "checkpoint-10/optimizer.pt" in done.err
    assert done.out.startswith("checkpoint of step 10 would be uploaded to ")
    assert BRANCH not in hub.repositories[REPO].branches or tree(hub) == []
    done = in_process.run(capsys, "push", run, REPO, "--every", 5)
    assert done.out.startswith("checkpoint of step 10: http")
    assert tree(hub) == names_of(10)
    assert (
        "--every cannot be used with --revision"
        in in_process.run(capsys, "push", run, REPO, "--every", 5, "--revision", "x", status=2).err
    )
    assert (
        "rejected the token"
        in in_process.run(capsys, "push", run, REPO, "--every", 5, "--token", "hf_wrong", status=1).err
    )
    told = in_process.run(capsys, "push", run, REPO, "--every", 5, "--token", READER, status=1).err
    assert "does not have write access" in told
    assert TOKEN not in told


def test_what_is_no_run(run: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        push_checkpoints(run / "nothing", REPO, every=0)
