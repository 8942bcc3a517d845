"""Pushing a run: the real huggingface_hub client against a local server, and the model card."""

from __future__ import annotations

import ast
import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants, hf_hub_download
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cogtune.config.resolving import resolve
from cogtune.encoding import jobs
from cogtune.hub import push
from cogtune.hub.card import CardFacts, SampleVideo, gather_facts, model_card
from cogtune.hub.public import public_file
from cogtune.hub.redaction import redacted
from cogtune.models.configs import COMPONENTS
from cogtune.models.geometry import Size
from cogtune.models.variants import LORA_WEIGHTS_NAME as LORA
from cogtune.models.variants import VARIANTS
from cogtune.system.errors import CogtuneError, UsageError
from tests.conftest import Cogtune
from tests.hub.conftest import READER, REPO, TOKEN
from tests.support import in_process
from tests.support.hub_server import Cut, Hub
from tests.support.runs_in_process import fill_here, plan_for, train_here

FACTS: dict[str, Any] = {
    "format": 1,
    "version": "0.1.0",
    "base_model": "THUDM/CogVideoX-5b",
    "model_path": "/home/anna/models/snapshots/8d6e",
    "variant": "5b",
    "type": "lora",
    "rank": 4,
    "alpha": 8.0,
    "size": "9x64x96",
    "fps": 8.0,
    "precision": "bf16",
    "id_token": "PBOAT",
    "prompt": "PBOAT a boat folded from a newspaper",
    "dataset": {"samples": 70, "digest": "0a1b2c3d"},
    "step": 500,
}


def lora_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    name = "transformer.transformer_blocks.0.attn1.to_q"
    return {
        f"{name}.lora_A.weight": rng.standard_normal((4, 8), dtype=np.float32),
        f"{name}.lora_B.weight": rng.standard_normal((8, 4), dtype=np.float32),
    }


def write_lora(path: Path, facts: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    adapter = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.base_model_name_or_path": "/home/anna/m",
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter)}
    if facts is not None:
        metadata["cogtune"] = json.dumps(dict(facts))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(seed), path, metadata)


def write_transformer(folder: Path, *, image: bool = False) -> None:
    folder.mkdir(parents=True)
    config = {
        "_class_name": "CogVideoXTransformer3DModel",
        "_name_or_path": "/home/anna/models/base/transformer",
        "in_channels": 32 if image else 16,
        "out_channels": 16,
        "patch_size_t": None,
        "use_rotary_positional_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": f"block.{n}.weight" for n in (1, 2)}
    for number, (shard, name) in enumerate(shards.items()):
        save_file({name: np.full((3, 2), number, np.float32)}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, name in shards.items()}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_run(out: Path, **flags: Any) -> Path:
    """A run's folder without weights: configuration, launch files, metrics, samples of two steps."""
    given = {
        "model": "5b",
        "size": "9x64x96",
        "rank": 4,
        "alpha": 8,
        "data": "/home/anna/clips",
        "output": str(out),
    }
    settings = resolve(flags=given | {"id_token": "PBOAT", "batch_size": 2, "learning_rate": 2e-4} | flags)
    (out / "launch").mkdir(parents=True)
    (out / "run.yaml").write_text(settings.to_yaml())
    (out / "launch" / "plan.json").write_text('{"secret": "launch"}')
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    for step in (100, 500):
        folder = out / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        for name in ("boat", "mill"):
            (folder / f"{name}.mp4").write_bytes(f"video of a {name} at {step}".encode() * 50)
        (folder / "boat.txt").write_text("PBOAT a paper boat: on | a 'pond'\n")
    return out


def write_checkpoint(out: Path, step: int, **facts: Any) -> Path:
    """A checkpoint's folder without weights."""
    folder = out / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps(FACTS | facts | {"step": step}))
    (folder / "optimizer.pt").write_bytes(b"moments")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    out = write_run(tmp_path / "out")
    write_lora(out / LORA, FACTS)
    write_checkpoint(out, 500)
    return out


def files_of(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    return {path: data for path, data in hub.repositories[REPO].files(branch).items() if path != ".gitattributes"}


def failure(run: Path, repo_id: str = REPO, **options: Any) -> CogtuneError:
    with pytest.raises(CogtuneError) as caught:
        push(run, repo_id, **options)
    assert TOKEN not in str(caught.value)
    assert READER not in str(caught.value)
    return caught.value


def test_a_push_makes_the_repository_in_one_commit(hub: Hub, run: Path, tmp_path: Path) -> None:
    result = push(run, REPO, message="Paper boats")
    repository = hub.repositories[REPO]
    assert list(files_of(hub)) == [
        "README.md",
        "run.yaml",
        LORA,
        "samples/step-000500/boat.mp4",
        "samples/step-000500/mill.mp4",
    ]
    assert repository.commits() == 1
    assert repository.messages == ["Paper boats"]
    assert not repository.private
    assert result.commit == repository.sha()
    assert result.url.endswith(f"/{REPO}")
    assert result.notes == ()
    assert result.files == tuple((path, len(data)) for path, data in files_of(hub).items())
    video = "samples/step-000500/mill.mp4"
    endpoint = result.url.removesuffix(f"/{REPO}")
    fetched = hf_hub_download(REPO, video, endpoint=endpoint, token=TOKEN, cache_dir=tmp_path / "cache")
    assert Path(fetched).read_bytes() == (run / video).read_bytes()


def test_the_lora_arrives_with_its_tensors_and_metadata(hub: Hub, run: Path, tmp_path: Path) -> None:
    endpoint = push(run, REPO).url.removesuffix(f"/{REPO}")
    fetched = hf_hub_download(REPO, LORA, endpoint=endpoint, token=TOKEN, cache_dir=tmp_path / "cache")
    tensors = load_file(fetched)
    assert tensors.keys() == lora_tensors().keys()
    for name, value in lora_tensors().items():
        np.testing.assert_array_equal(tensors[name], value)
    with safe_open(fetched, framework="numpy") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["lora_adapter_metadata"]) == {"transformer.r": 4, "transformer.lora_alpha": 8}
    assert json.loads(metadata["cogtune"]) == {key: value for key, value in FACTS.items() if key != "model_path"}


@pytest.mark.parametrize(("folder", "named"), [("CogVideoX-5b", "THUDM/CogVideoX-5b"), ("mine", None)])
def test_a_base_model_on_the_disk_is_named_only_when_it_is_known(
    hub: Hub, tmp_path: Path, folder: str, named: str | None
) -> None:
    write_lora(tmp_path / LORA, FACTS | {"base_model": f"/home/anna/{folder}"})
    push(tmp_path, REPO)
    (tmp_path / "pushed").write_bytes(files_of(hub)[LORA])
    with safe_open(tmp_path / "pushed", framework="numpy") as handle:
        assert json.loads(handle.metadata()["cogtune"]).get("base_model") == named
    assert ModelCard(files_of(hub)["README.md"].decode()).data.to_dict().get("base_model") == named


def test_a_lora_without_local_paths_arrives_byte_for_byte(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "clean.safetensors"
    save_file(lora_tensors(), path, {"cogtune": json.dumps({"variant": "2b", "base_model": "2b"})})
    push(path, REPO)
    assert files_of(hub)[LORA] == path.read_bytes()
    assert list(files_of(hub)) == ["README.md", LORA]


def test_secrets_and_local_paths_stay_at_home(hub: Hub, run: Path, tmp_path: Path) -> None:
    private = {
        "wandb_api_key": "0123456789abcdef",
        "hub_token": "nothing-that-looks-like-one",
        "note": "login with hf_abcdefghijklmnopqrstuvwx",
        "tracked_at": "https://anna:pa55@tracker.example/boats",
        "extra": ["--seed=1", "--cache=/home/anna/cache", "C:\\Users\\anna"],
    }
    lines = (run / "run.yaml").read_text().splitlines()
    others = [line for line in lines if not line.startswith("tracker:")]  # a key that is there twice is refused
    (run / "run.yaml").write_text("\n".join(others) + "\n" + yaml.safe_dump(private))
    push(run, REPO)
    pushed = b"".join(files_of(hub).values())
    for secret in (
        "anna/",
        "0123456789abcdef",
        "nothing-that-looks",
        "hf_",
        "pa55",
        "Users",
        str(tmp_path),
        TOKEN,
    ):
        assert secret.encode() not in pushed.replace(REPO.encode(), b"")
    kept = yaml.safe_load(files_of(hub)["run.yaml"])
    assert kept["extra"] == ["--seed=1"]
    assert kept["id_token"] == "PBOAT"
    assert kept["learning_rate"] == 2e-4
    assert {"data", "output", "cache_dir", *private} & set(kept) == {"cache_dir", "extra"}


def test_the_pushed_configuration_is_one_that_train_takes(hub: Hub, run: Path, tmp_path: Path) -> None:
    text = (run / "run.yaml").read_text().replace("model: 5b", "model: /home/anna/models/CogVideoX-5b")
    (run / "run.yaml").write_text(text)
    push(run, REPO)
    (tmp_path / "again.yaml").write_bytes(files_of(hub)["run.yaml"])
    config = resolve(file=tmp_path / "again.yaml").config
    assert config.model == "THUDM/CogVideoX-5b"
    assert (config.rank, config.size, config.batch_size) == (4, "9x64x96", 2)


def test_a_second_push_updates_the_repository(hub: Hub, run: Path) -> None:
    first = push(run, REPO)
    other = (run / "samples" / "step-000500").rename(run / "samples" / "step-000499")
    (other / "mill.mp4").unlink()
    (run / "samples" / "step-000700").mkdir()
    (run / "samples" / "step-000700" / "boat.mp4").write_bytes(b"not by the weights of step 500")
    (other / "boat.mp4").write_bytes(b"a better boat")
    hub.repositories[REPO].files()["photo.jpg"] = b"put there by hand"
    sent = len(hub.uploads)
    second = push(run, REPO)
    assert hub.repositories[REPO].commits() == 2
    assert sorted(files_of(hub)) == ["README.md", "photo.jpg", LORA, "run.yaml", "samples/step-000499/boat.mp4"]
    assert second.removed == ("samples/step-000500/boat.mp4", "samples/step-000500/mill.mp4")
    assert second.commit != first.commit
    assert len(hub.uploads) == sent + 1  # the weights were there already
    third = push(run, REPO)
    assert third.commit == second.commit
    assert third.notes == (f"nothing has changed since the last push to {REPO}",)
    assert hub.repositories[REPO].commits() == 2


def test_private(hub: Hub, run: Path) -> None:
    push(run, REPO, private=True)
    assert hub.repositories[REPO].private
    push(run, REPO)
    assert hub.repositories[REPO].private
    hub.repositories[REPO].private = False
    before = len(hub.requests)
    error = failure(run, private=True)
    assert "is public" in error.message
    failure(run, private=True, revision="hidden")
    assert list(hub.repositories[REPO].branches) == ["main"]
    assert not [line for line in hub.requests[before:] if "preupload" in line or "commit" in line]


def test_a_branch_is_made_and_main_stays(hub: Hub, run: Path) -> None:
    result = push(run, REPO, revision="step-500")
    assert result.url.endswith(f"/{REPO}/tree/step-500")
    assert files_of(hub) == {}
    assert LORA in files_of(hub, "step-500")
    push(run, REPO, revision="step-500")
    assert hub.repositories[REPO].commits("step-500") == 1


def test_a_dry_run_lists_the_files_and_asks_nobody(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = push(run, REPO, dry_run=True)
    assert result.commit is None
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push(run, REPO).files == result.files


def test_the_newest_checkpoint_stands_in_for_final_weights(hub: Hub, tmp_path: Path) -> None:
    out = write_run(tmp_path / "out")
    for step in (90, 300):
        write_lora(write_checkpoint(out, step) / LORA, FACTS | {"step": step}, seed=step)
    write_lora(out / "checkpoint-400" / LORA, FACTS | {"step": 400})  # has no state.json: not whole
    result = push(out, REPO)
    assert result.notes == (f"{out} has no final weights; pushing its newest checkpoint, checkpoint-300",)
    pushed = tmp_path / "pushed.safetensors"
    pushed.write_bytes(files_of(hub)[LORA])
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    np.testing.assert_array_equal(load_file(pushed)[name], lora_tensors(300)[name])
    assert "| Steps | 300 |" in files_of(hub)["README.md"].decode()
    assert [path for path in files_of(hub) if "samples" in path] == [
        "samples/step-000100/boat.mp4",
        "samples/step-000100/mill.mp4",
    ]


@pytest.mark.parametrize("given", ["checkpoint-90", f"checkpoint-90/{LORA}"])
def test_a_checkpoint_knows_its_run(hub: Hub, tmp_path: Path, given: str) -> None:
    out = write_run(tmp_path / "out")
    write_lora(write_checkpoint(out, 90) / LORA, FACTS | {"step": 90})
    result = push(out / given, REPO)
    assert [path for path, _ in result.files] == ["README.md", "run.yaml", LORA]  # no samples that early
    assert "| Samples per step | 2 |" in files_of(hub)["README.md"].decode()


def test_a_full_fine_tune(hub: Hub, tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", type="sft")
    checkpoint = write_checkpoint(out, 500, type="sft", base_model="5b-i2v", variant="5b-i2v")
    write_transformer(checkpoint / "transformer", image=True)
    push(out, REPO)
    files = files_of(hub)
    assert [path for path in files if path.startswith("transformer/")] == [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert len(files) == 4 + 2 + 2
    config = json.loads(files["transformer/config.json"])
    assert "_name_or_path" not in config
    assert config["in_channels"] == 32
    data = ModelCard(files["README.md"].decode()).data.to_dict()
    assert data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "image-to-video"
    assert data["base_model"] == "THUDM/CogVideoX-5b-I2V"


def write_pipeline(folder: Path) -> Path:
    write_transformer(folder / "transformer")
    spec = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "patch_size": 2,
        "text_embed_dim": 8,
        "max_text_seq_length": 8,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 9,
    }
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | spec))
    names = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    index = {"_class_name": "CogVideoXPipeline", "_name_or_path": "/home/anna/base"} | {
        name: [COMPONENTS[name][0], "Y"] for name in names
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "merge.json").write_text('{"step": 300, "cogtune": "0.1.0", "checkpoint": "checkpoint-300"}')
    base = folder.parent / "base"
    for name in names[1:]:
        (base / name).mkdir(parents=True)
        (folder / name).symlink_to(base / name)
    (base / "vae" / "config.json").write_text('{"scaling_factor": 0.7}')
    save_file({"weight": np.ones(2, np.float32)}, base / "vae" / "diffusion_pytorch_model.safetensors")
    (base / "text_encoder" / "config.json").write_text("{}")
    save_file({"weight": np.ones(2, np.float32)}, base / "text_encoder" / "model.safetensors")
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "tokenizer" / "spiece.model").write_bytes(b"pieces")
    (base / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "</s>", "name_or_path": "/home/anna/t"}')
    scheduler = {"num_train_timesteps": 1000, "snr_shift_scale": 1.0}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def test_a_merged_pipeline_with_linked_components(hub: Hub, tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", type="sft", strategy="zero3", num_processes=4)
    merged = write_pipeline(out / "checkpoint-300-merged")
    error = failure(merged)
    assert error.message == f"4 links lead out of {merged}"
    assert "--allow-outside" in error.hint
    assert REPO not in hub.repositories
    push(merged, REPO, allow_outside=True)
    files = files_of(hub)
    assert sorted(path for path in files if not path.startswith("samples/step-000100/")) == [
        "README.md",
        "model_index.json",
        "run.yaml",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/spiece.model",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert b"anna/" not in b"".join(files.values()).replace(REPO.encode(), b"")
    assert json.loads(files["tokenizer/tokenizer_config.json"]) == {"eos_token": "</s>"}
    card = files["README.md"].decode()
    assert f'CogVideoXPipeline.from_pretrained("{REPO}"' in card
    assert "| Steps | 300 |" in card
    assert "| Samples per step | 8 |" in card
    assert "cogtune infer --model paper-boats --prompt" in card


def test_fewer_shards_leave_no_old_ones_behind(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    write_transformer(folder)
    push(folder, REPO)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({"weight": np.ones(2, np.float32)}, folder / "diffusion_pytorch_model.safetensors")
    push(folder, REPO)
    assert sorted(files_of(hub)) == [
        "README.md",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]


def test_an_upload_that_breaks_off_changes_nothing_and_goes_on(hub: Hub, run: Path) -> None:
    hub.break_uploads_after = 1
    error = failure(run)
    assert error.message == f"the upload to {REPO} was interrupted"
    assert error.details == ("Server disconnected without sending a response.",)
    assert "run the same command again" in error.hint
    assert files_of(hub) == {}
    arrived = list(hub.uploads)
    assert len(arrived) == 1
    hub.break_uploads_after = None
    push(run, REPO)
    assert hub.uploads[:1] == arrived
    assert len(hub.uploads) == len(set(hub.uploads)) == 3  # each large file was sent once
    assert hub.repositories[REPO].commits() == 1


CUTS = {
    "creating, before": Cut("POST /api/repos/create", "before"),
    "creating, unanswered": Cut("POST /api/repos/create", "after"),
    "a large file, halfway": Cut("PUT /blobs/.*", "halfway"),
    "a large file, unanswered": Cut("PUT /blobs/.*", "after"),
    "the commit, halfway": Cut("POST /api/models/.*/commit/main", "halfway"),
    "the commit, unanswered": Cut("POST /api/models/.*/commit/main", "after"),
}


@pytest.mark.parametrize("place", CUTS)
def test_a_connection_cut_anywhere_ends_in_words_and_the_same_command_finishes(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    hub.cut = CUTS[place]
    told = in_process.run(capsys, "push", run, REPO, "--private", status=1).err
    assert f"the upload to {REPO} was interrupted" in told
    assert "run the same command again to continue" in " ".join(told.split())
    assert "Traceback" not in told
    assert TOKEN not in told
    there = hub.repositories.get(REPO)
    committed = place == "the commit, unanswered"
    assert (there is not None) == (place != "creating, before")
    assert there is None or there.commits() == committed  # all of it, or nothing
    arrived = list(hub.uploads)
    hub.cut = None
    in_process.run(capsys, "push", run, REPO, "--private")
    later = hub.uploads[len(arrived) :]
    assert len(later) == 3 - len(set(arrived))  # nothing that had arrived was sent again
    assert not set(later) & set(arrived)
    assert hub.repositories[REPO].commits() == 1
    assert hub.repositories[REPO].private
    assert set(files_of(hub)) >= {"README.md", "run.yaml", LORA, "samples/step-000500/boat.mp4"}


def test_a_server_that_dies_in_an_upload(hub: Hub, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.break_uploads_after, hub.dies = 1, True
    assert failure(run).message == f"the upload to {REPO} was interrupted"
    assert capfd.readouterr() == ("", "")
    assert hub.dead
    assert files_of(hub) == {}
    assert hub.repositories[REPO].commits() == 0


def test_no_network(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert failure(run).message == "cannot reach http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert failure(run).message == "cannot push: offline mode is on"


def test_whose_token_and_from_where(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = failure(run, token="hf_NotOneThatTheServerKnows00")
    assert error.message == "the Hub rejected the token from --token"
    assert "hf_NotOne" not in str(error)
    error = failure(run, token=READER)
    assert error.message == f"the token from --token does not have write access to {REPO}"
    assert "the token belongs to anna (organisations: none)" in error.details
    assert failure(run, "bert/boats").message == "the token from HF_TOKEN does not have write access to bert/boats"
    error = failure(run, token="hf_two\nlines")
    assert "contains spaces or invalid characters" in error.message
    assert "two" not in str(error)
    monkeypatch.delenv("HF_TOKEN")
    assert failure(run).message == "you are not logged in to the Hub"
    assert hub.repositories == {}
    Path(constants.HF_TOKEN_PATH).write_text("hf_AnOldLoginThatHasExpired1")
    assert failure(run).message == "the Hub rejected the token from the saved login"
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN + "\n")
    push(run, REPO)
    assert LORA in files_of(hub)


def test_a_reader_of_an_existing_repository_may_not_write(hub: Hub, run: Path) -> None:
    push(run, REPO)
    assert failure(run, token=READER).message == f"the token from --token does not have write access to {REPO}"
    assert hub.repositories[REPO].commits() == 1


def test_a_name_that_is_taken(hub: Hub, run: Path, tmp_path: Path) -> None:
    endpoint = push(run, REPO).url.removesuffix(f"/{REPO}")
    write_transformer(tmp_path / "transformer")
    assert failure(tmp_path / "transformer").message == f"{REPO} contains a LoRA, but this is a transformer"
    api = huggingface_hub.HfApi(endpoint=endpoint, token=TOKEN)
    api.create_repo("anna/clips", repo_type="dataset")
    assert failure(run, "anna/clips").message == "anna/clips already exists as a dataset"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, f"the Hub rejected the upload to {REPO}"),
        (412, f"someone else changed {REPO} during the upload"),
        (507, f"the upload to {REPO} failed with status 507"),
    ],
)
def test_a_commit_that_is_refused(hub: Hub, run: Path, status: int, words: str) -> None:
    hub.refuse_commit = (status, f"told to {TOKEN}")
    error = failure(run)
    assert error.message == words
    assert error.details == ("told to ***",)
    assert files_of(hub) == {}


def test_a_remark_of_the_hub_about_the_card_is_passed_on(hub: Hub, run: Path) -> None:
    hub.card_warning = "no such tag"
    assert any("no such tag" in note for note in push(run, REPO).notes)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("boats", "write user/boats"),
        ("https://huggingface.co/anna/boats", "write it anna/boats"),
        ("datasets/anna/boats", "write it user/name"),
        ("anna/my boats", "write it user/name"),
        ("anna/boats.git", "write it user/name"),
    ],
)
def test_names_that_are_none(run: Path, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(name)) as caught:
        push(run, name)
    assert caught.value.hint.startswith(hint)
    assert caught.value.exit_code == 2


def test_the_command(hub: Hub, run: Path, cogtune: Cogtune) -> None:
    online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = cogtune("push", run, REPO, env=online)
    assert done.out.strip().endswith(REPO)
    assert "README.md" in done.err
    assert set(files_of(hub)) >= {"README.md", "run.yaml", LORA}
    assert TOKEN not in done.out + done.err
    told = cogtune("push", run, "no-slash", status=2, env=online).err
    assert "has no owner" in told
    told = cogtune("push", run, REPO, "--token", "hf_wrong", status=1, env=online).err
    assert "hf_wrong" not in told
    assert "hint: " in told


def test_local_paths_deep_in_a_components_config_stay_at_home(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"pad_token": "<pad>", "nested": {"from": "/home/anna/x", "list": ["~/y", "z"]}}))
    public = public_file(config, None, tmp_path)
    assert isinstance(public, bytes)
    assert json.loads(public) == {"pad_token": "<pad>", "nested": {"list": ["z"]}}


def test_nothing_to_push(tmp_path: Path) -> None:
    assert "no such file or folder" in failure(tmp_path / "typo").message
    out = write_run(tmp_path / "out")
    error = failure(out)
    assert error.message == f"{out} contains no weights to push"
    assert f"no {LORA} (a LoRA)" in error.details
    (write_checkpoint(out, 10) / "latest").write_text("pytorch_model")
    assert f"cogtune merge-zero {out / 'checkpoint-10'}" in failure(out).hint
    (tmp_path / "lora.pt").write_bytes(b"x")
    assert "is not a .safetensors file" in failure(tmp_path / "lora.pt").message


def test_empty_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = lora_tensors()
    first, second = tensors
    save_file({first: np.zeros((0,), np.float32), second: np.zeros((0, 4), np.float32)}, path)
    assert failure(path).details == (
        f"{LORA}: {first} is empty, with shape [0]",
        f"{LORA}: {second} is empty, with shape [0, 4]",
    )
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-4])
    assert f"{LORA} is damaged or truncated" in failure(path).details[0]
    save_file({}, path)
    assert failure(path).details == (f"{LORA} contains no tensors",)
    save_file({"patch_embed.proj.weight": np.ones(2, np.float32)}, path)
    assert failure(path).details == (f"{path} contains no LoRA in the diffusers format",)
    save_file(tensors, path)
    assert "cannot tell which CogVideoX model" in failure(path).message


def test_missing_pieces_are_named_all_at_once(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "merged")
    (folder / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    (folder / "vae").unlink()
    error = failure(folder, allow_outside=True)
    assert error.details == (
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors is listed in "
        "diffusion_pytorch_model.safetensors.index.json but missing",
        "vae/ is listed in model_index.json but missing or empty",
    )


# --------------------------------------------------------------------------------- folders of other people


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A merged folder with copies of its base model's components."""
    folder = write_pipeline(tmp_path / "merged")
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        linked = (folder / name).resolve()
        (folder / name).unlink()
        shutil.copytree(linked, folder / name)
    return folder


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder that is nobody else's business, with files of every name that a push takes."""
    folder = tmp_path / "private"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json", "id_rsa", "notes.txt", "run.yaml", "state.json"):
        (folder / name).write_text('{"secret": "of anna"}')
    save_file({"secret": np.ones(2, np.float32)}, folder / "model.safetensors")
    save_file({"secret": np.ones(2, np.float32)}, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize("name", [".", "..", "ABSOLUTE", "vae/../../private", "private", "", "scheduler/"])
def test_a_component_is_one_that_a_pipeline_has(hub: Hub, pipeline: Path, private: Path, name: str) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    index[str(private) if name == "ABSOLUTE" else name] = ["diffusers", "AutoencoderKLCogVideoX"]
    (pipeline / "model_index.json").write_text(json.dumps(index))
    error = failure(pipeline)
    assert str(pipeline / "model_index.json") in error.message
    assert "is not a component of a CogVideoX pipeline" in error.message
    assert hub.requests == []


@pytest.mark.parametrize("value", [["os", "system"], ["diffusers"], ["diffusers", 5], [None, "X"], [["a"], "b"]])
def test_a_component_is_a_class_of_its_library(hub: Hub, pipeline: Path, value: list[Any]) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {"vae": value}))
    assert "model_index.json: vae:" in failure(pipeline).message
    assert hub.requests == []


def test_only_what_a_component_is_made_of_goes_along(hub: Hub, pipeline: Path) -> None:
    stray = ("notes.txt", "secrets.json", "passwords.model", "other.safetensors", "model.bin", "config.json.bak")
    for component in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        for name in stray:
            (pipeline / component / name).write_bytes(b"private")
    result = push(pipeline, REPO)
    assert not any(path.endswith(stray) for path in files_of(hub))
    left_out = next(note for note in result.notes if note.startswith("not uploaded"))
    assert left_out.count("/") == 5 * len(stray) + 1  # and text_encoder/pytorch_model.bin


@pytest.mark.parametrize(
    "place",
    [
        "vae",
        "vae/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "merge.json",
    ],
)
def test_nothing_is_published_through_a_link_out(hub: Hub, pipeline: Path, private: Path, place: str) -> None:
    path = pipeline / place
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    targets = {"vae": private, "merge.json": private / "state.json"}
    path.symlink_to(targets.get(place, private / ("model.safetensors" if "safetensors" in place else "config.json")))
    error = failure(pipeline)
    assert f"{path} is a link to {private}" in error.message
    assert hub.requests == []


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("samples/step-000500/boat.mp4", "id_rsa"),
        ("samples/step-000500/boat.txt", "notes.txt"),
        ("samples/step-000500", ""),
        ("samples", ""),
        ("run.yaml", "run.yaml"),
        (LORA, "model.safetensors"),
    ],
)
def test_a_run_is_published_without_what_links_bring_in(
    hub: Hub, run: Path, private: Path, place: str, target: str
) -> None:
    path = run / place
    if target == "":
        (private / "step-000500").mkdir()
        (private / "step-000500" / "boat.mp4").write_bytes(b"private")
        (private / "boat.mp4").write_bytes(b"private")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(private / target)
    error = failure(run)
    assert str(private) in str(error)
    assert "--allow-outside" in error.hint
    assert hub.requests == []


def test_a_link_that_stays_inside_is_published(hub: Hub, run: Path) -> None:
    video = run / "samples" / "step-000500" / "boat.mp4"
    shutil.move(video, run / "boat.mp4")
    video.symlink_to(run / "boat.mp4")
    push(run, REPO)
    assert files_of(hub)["samples/step-000500/boat.mp4"] == (run / "boat.mp4").read_bytes()


def test_everything_is_listed_before_anything_is_sent(hub: Hub, run: Path) -> None:
    told: list[tuple[int, list[str]]] = []
    result = push(run, REPO, tell=lambda files: told.append((len(hub.requests), [path for path, _ in files])))
    assert told == [(0, [path for path, _ in result.files])]
    assert hub.requests


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper": str.upper,
    "reversed": lambda token: token[::-1],
    "base64": lambda token: base64.b64encode(token.encode()).decode(),
    "base64 of a header": lambda token: base64.b64encode(f"Bearer {token}".encode()).decode(),
    "base64 of a login": lambda token: base64.b64encode(f"anna:{token}:x".encode()).decode(),
    "base64 for URLs": lambda token: base64.urlsafe_b64encode(f"??>{token}".encode()).decode(),
    "base64 twice": lambda token: base64.b64encode(base64.b64encode(token.encode())).decode(),
    "base32": lambda token: base64.b32encode(f"ab{token}".encode()).decode(),
    "hex": lambda token: token.encode().hex(),
    "HEX": lambda token: token.encode().hex().upper(),
    "percent": lambda token: "".join(f"%{byte:02x}" for byte in token.encode()),
    "JSON": lambda token: json.dumps({"authorization": f"Bearer {token}"}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_token_is_taken_out_of_a_hubs_words_however_it_is_spelled(spelling: str) -> None:
    echoed = SPELLINGS[spelling](TOKEN)
    said = redacted(f"bad request by {echoed} for {REPO}", TOKEN, (REPO,))
    assert REPO in said
    assert "***" in said
    inner = echoed[echoed.find(TOKEN) if TOKEN in echoed else 10 : -4]  # what else is around it may stay
    for piece in (inner[at : at + 8] for at in range(len(inner) - 8)):
        assert piece not in said


def test_words_without_a_token_stay(run: Path) -> None:
    said = (
        f"Repository {REPO} is over its quota of 100000000000 bytes: see https://huggingface.co/docs/hub/storage-limits"
    )
    assert redacted(said, TOKEN, (REPO,)) == said


HOSTILE_TEXT = (
    "<img src=x onerror=alert(1)> <script>alert(2)</script> [click](javascript:alert(3)) ![p](https://evil.example/x) "
    "| a | b |\n\n# Heading\n```\n<b>bold</b>\n---\n<https://evil.example> `code` **strong** @anna $x$ "
    "\u202egnp.exe\x1b[31m\x9b\x7f"
)


@pytest.mark.parametrize("field", ["prompt", "trigger", "dataset_digest", "cogtune_version", "sample", "name"])
def test_what_others_wrote_is_text_in_the_card(field: str) -> None:
    from markdown_it import MarkdownIt

    usual = SampleVideo("samples/a.mp4", "a mill")
    changes: dict[str, dict[str, Any]] = {
        "sample": {"samples": (SampleVideo("samples/a.mp4", HOSTILE_TEXT),)},
        "name": {"samples": (SampleVideo("samples/<b>](x) [y](z.mp4", "a mill"),)},
    }
    plain = model_card(card_facts("5b", samples=(usual,), trigger="x", prompt="p"))
    card = model_card(card_facts("5b", **({"samples": (usual,)} | changes.get(field, {field: HOSTILE_TEXT}))))
    assert not set(card) & set("\u202e\x1b\x9b\x7f")
    assert ModelCard(card).data.to_dict()["base_model"] == "THUDM/CogVideoX-5b"
    render = MarkdownIt("commonmark", {"html": True}).enable("table").render

    def markup(text: str) -> list[str]:
        body = text.split("\n---\n", 1)[1]
        return sorted(set(re.findall(r"<[a-z][^>]*>", render(body))))

    added = [tag for tag in markup(card) if tag not in markup(plain)]
    assert added == ([] if field != "name" else [tag for tag in added if tag.startswith('<a href="samples/')])


@pytest.mark.parametrize(
    ("stamp", "config"),
    [
        ({"step": "x", "rank": [], "alpha": "8", "size": {}, "fps": None, "dataset": []}, {}),
        ({"step": True, "rank": 10**400, "alpha": float("nan"), "size": "9" * 4000 + "x1x1"}, {"seed": 10**400}),
        ({"dataset": {"samples": {}, "digest": 5}, "prompt": 5, "version": None, "precision": []}, {"batch_size": "x"}),
        ({"base_model": "models--<script>--x", "id_token": 5}, {"learning_rate": float("inf"), "model": 5}),
    ],
)
def test_a_stamp_of_other_types_is_left_out_of_the_card(
    tmp_path: Path, stamp: dict[str, Any], config: dict[str, Any]
) -> None:
    card = model_card(gather_facts(REPO, "lora", tmp_path, {"variant": "5b"} | stamp, config))
    assert "nan" not in card
    assert "inf |" not in card
    assert "<script>" not in card
    assert len(card) < 5000


def test_pushing_needs_no_torch(run: Path) -> None:
    code = (
        "import sys, pathlib, cogtune.hub\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        f"cogtune.hub.push(pathlib.Path({str(run)!r}), 'anna/boats', dry_run=True)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The card


def card_facts(variant: str, **changes: Any) -> CardFacts:
    row = VARIANTS[variant]
    given: dict[str, Any] = {
        "repo_id": REPO,
        "kind": "lora",
        "variant": row,
        "base_model": row.hub_id,
        "size": row.native,
        "fps": float(row.fps),
        "precision": row.trained_in,
    }
    return CardFacts(**(given | changes))


def snippet(card: str) -> str:
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found
    ast.parse(found[1])
    return found[1]


def test_what_the_card_of_a_run_says(hub: Hub, run: Path) -> None:
    push(run, REPO)
    card = ModelCard(files_of(hub)["README.md"].decode())
    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "cogvideox-license",
        "license_link": "https://huggingface.co/THUDM/CogVideoX-5b/blob/main/LICENSE",
        "language": "en",
        "base_model": "THUDM/CogVideoX-5b",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "tags": ["cogvideox", "cogtune", "lora", "template:sd-lora"],
        "instance_prompt": "PBOAT",
        "widget": [
            {"text": "PBOAT a paper boat: on | a 'pond'", "output": {"url": "samples/step-000500/boat.mp4"}},
            {"text": "-", "output": {"url": "samples/step-000500/mill.mp4"}},
        ],
    }
    for row in (
        "| Training samples | 70 |",
        "| Dataset digest | `0a1b2c3d` |",
        "| Steps | 500 |",
        "| Samples per step | 2 |",
        "| Frames x height x width | 9x64x96 |",
        "| Frames per second | 8 |",
        "| Rank | 4 |",
        "| Alpha | 8 |",
        "| Learning rate | 0.0002 |",
        "| Precision | bf16 |",
        "| Seed | 42 |",
        "| cogtune | 0.1.0 |",
    ):
        assert row in card.text
    assert "<Gallery />" in card.text
    assert "- [mill.mp4](samples/step-000500/mill.mp4)\n" in card.text
    assert "hf download anna/paper-boats --local-dir paper-boats" in card.text


@pytest.mark.parametrize("name", VARIANTS)
def test_the_code_of_each_model(name: str) -> None:
    row = VARIANTS[name]
    card = model_card(card_facts(name))
    code = snippet(card)
    data = ModelCard(card).data.to_dict()
    assert f'from_pretrained("{row.hub_id}", dtype=torch.{"float16" if name == "2b" else "bfloat16"})' in code
    assert f'pipe.load_lora_weights("{REPO}", weight_name="{LORA}")' in code
    assert ("image=load_image(" in code) == ("CogVideoXImageToVideoPipeline" in code) == name.endswith("i2v")
    assert ("--image first-frame.png" in card) == name.endswith("i2v")
    assert data["pipeline_tag"] == ("image-to-video" if name.endswith("i2v") else "text-to-video")
    assert f"num_frames={row.native.num_frames}," in code
    assert f"height={row.native.height}," in code
    assert f'export_to_video(frames, "video.mp4", fps={row.fps})' in code
    assert data["license"] == ("apache-2.0" if name == "2b" else "other")
    assert ("license_link" in data) == ("license_name" in data) == (name != "2b")
    scheduler = "DDIM" if name == "2b" else "DPM"
    assert f"pipe.scheduler = CogVideoX{scheduler}Scheduler.from_config(" in code
    assert f"use_dynamic_cfg={name != '2b'}," in code
    assert "widget" not in data
    assert "None" not in card


def test_the_code_of_whole_weights() -> None:
    code = snippet(model_card(card_facts("5b", kind="transformer", prompt="a mill")))
    assert 'prompt="a mill",' in code
    assert f'"{REPO}", subfolder="transformer"' in code
    assert 'CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b", transformer=transformer' in code
    code = snippet(model_card(card_facts("5b-i2v", kind="pipeline")))
    assert f'CogVideoXImageToVideoPipeline.from_pretrained("{REPO}"' in code
    assert "lora" not in code


def test_a_base_that_is_nowhere_is_not_claimed() -> None:
    card = model_card(card_facts("5b", base_model=None))
    data = ModelCard(card).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "an unpublished model with the architecture of THUDM/CogVideoX-5b" in card
    assert "--lora paper-boats --model path/to/the/base/model" in card


def test_odd_prompts_break_neither_code_nor_metadata() -> None:
    prompt = "a \"sign\" saying: 'no'\n--- # $(rm) é\\"
    card = model_card(card_facts("5b", samples=(SampleVideo("samples/a b.mp4", prompt),)))
    assert ModelCard(card).data.to_dict()["widget"][0]["text"] == prompt
    call = next(
        node for node in ast.walk(ast.parse(snippet(card))) if isinstance(node, ast.keyword) and node.arg == "prompt"
    )
    assert ast.literal_eval(call.value) == prompt
    assert "- [a b.mp4](samples/a%20b.mp4)" in card


@pytest.mark.slow
def test_every_sample_video_of_a_trained_run_is_pushed_with_its_prompt(
    hub: Hub, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is one that training made."""
    monkeypatch.setattr(jobs, "fill_cache", fill_here)
    prompts = ["A red disc, slowly.", "a red disc slowly", "ein Ball: «rot»"]
    out = tmp_path / "out"
    flags: dict[str, Any] = {
        "validation_prompts": ":::".join(prompts),
        "sample_steps": 2,
        "sample_every": 1,
        "checkpoint_every": 1,
    }
    train_here(plan_for(clips, out, steps=2, **flags))
    push(out, REPO)
    card = ModelCard(files_of(hub)["README.md"].decode())
    widgets = {entry["output"]["url"]: entry["text"] for entry in card.data.to_dict()["widget"]}
    videos = [path for path in files_of(hub) if path.endswith(".mp4")]
    assert [path.rpartition("/")[0] for path in videos] == ["samples/step-000002"] * 3
    assert [widgets[path] for path in videos] == prompts
    for path, prompt in zip(videos, prompts, strict=True):
        escaped = prompt.replace(":", "\\:")  # it is shown as it is, and no markup
        assert f"({quote(path)}): {escaped}\n" in card.text


@pytest.mark.parametrize(
    ("model", "hub_id"),
    [
        ("zai-org/CogVideoX-5b", "THUDM/CogVideoX-5b"),
        ("5b", "THUDM/CogVideoX-5b"),
        ("anna/boats-sft", "anna/boats-sft"),
        ("/data/CogVideoX1.5-5B/", "THUDM/CogVideoX1.5-5B"),
        ("/cache/hub/models--zai-org--CogVideoX-5b/snapshots/8d6e", "zai-org/CogVideoX-5b"),
        ("/data/mine", None),
        ("tiny:5b", None),
        ("nano:5b", None),
        ("../mine", None),
    ],
)
def test_which_hub_id_a_base_has(tmp_path: Path, model: str, hub_id: str | None) -> None:
    facts = gather_facts(REPO, "lora", tmp_path, {"variant": "5b", "base_model": model}, {})
    assert facts.base_model == hub_id
    assert facts.size == Size(49, 480, 720)
    assert facts.steps is None
