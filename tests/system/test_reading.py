"""What is read from disk is not trusted: JSON of any shape, model configs, libraries' words, leftovers of a kill."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogtune.commands.infer.making import generate
from cogtune.commands.infer.request import InferRequest
from cogtune.data.cache.facts import Facts
from cogtune.models.checkpoint_configs import read_spec
from cogtune.models.locate import loading
from cogtune.report.page import write_page
from cogtune.run import launch
from cogtune.run.plan import Plan
from cogtune.system import console
from cogtune.system.errors import CogtuneError, said_by
from cogtune.system.folders import remove_leftovers
from cogtune.system.json_files import read_json
from cogtune.system.reading import Schema, problems_in, read_as, read_object

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (DEEP.encode(), "nested too deeply"),
        (b'{"a":' * 65 + b"[]" + b"}" * 65, "nested too deeply"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"a": 1}'.encode("utf-16"), "can't decode"),
        (b"", "Expecting value"),
        (b"1" * 5000, "limit"),
        (b'{"a": 1', "delimiter"),
    ],
)
def test_what_is_no_json_is_refused_by_name(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(data)
    with pytest.raises(CogtuneError, match=rf"some\.json is not valid JSON: .*{reason}"):
        read_json(path)


def test_a_pipe_or_a_folder_in_a_files_place_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path):
        with pytest.raises(CogtuneError, match=f"cannot read {path}"):
            read_json(path)


@pytest.mark.parametrize("value", [[], "x", 5, None, True])
def test_an_object_is_asked_for_by_name(tmp_path: Path, value: Any) -> None:
    (tmp_path / "some.json").write_text(json.dumps(value))
    with pytest.raises(CogtuneError, match=r"some\.json contains .*, not a JSON object"):
        read_object(tmp_path / "some.json")


class Two(Schema):
    count: int
    names: list[str] = []  # noqa: RUF012 (pydantic copies it)


def test_every_wrong_key_is_named_with_its_value(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text('{"count": "5", "names": [1, "x", null]}')
    with pytest.raises(CogtuneError) as caught:
        read_as(tmp_path / "some.json", Two)
    place = tmp_path / "some.json"
    assert caught.value.details == (
        f"{place}: count: input should be a whole number, not '5'",
        f"{place}: names.0: input should be text, not 1",
        f"{place}: names.2: input should be text, not None",
    )
    assert problems_in({}, Two) == ["count: the key is missing"]
    assert problems_in({"count": True}, Two) == ["count: input should be a whole number, not True"]
    assert len(problems_in({"count": "x" * 10_000}, Two)[0]) < 200
    assert read_as_written(tmp_path, {"count": 5, "more": 1}).count == 5


def read_as_written(folder: Path, value: Any) -> Two:
    (folder / "other.json").write_text(json.dumps(value))
    return read_as(folder / "other.json", Two)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("transformer/config.json", "num_layers", 10**15),
        ("transformer/config.json", "num_layers", "2"),
        ("transformer/config.json", "num_layers", True),
        ("transformer/config.json", "num_layers", 2.5),
        ("transformer/config.json", "patch_size", 0),
        ("transformer/config.json", "sample_width", 10**15),
        ("transformer/config.json", "sample_frames", -1),
        ("transformer/config.json", "text_embed_dim", [32]),
        ("transformer/config.json", "use_rotary_positional_embeddings", "yes"),
        ("transformer/config.json", "norm_eps", "small"),
        ("transformer/config.json", "norm_eps", float("nan")),
        ("vae/config.json", "scaling_factor", None),
        ("vae/config.json", "block_out_channels", [10**15]),
        ("vae/config.json", "layers_per_block", 10**9),
        ("vae/config.json", "temporal_compression_ratio", 10**400),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12),
        ("scheduler/scheduler_config.json", "beta_start", "x"),
        ("text_encoder/config.json", "num_layers", 10**9),
        ("text_encoder/config.json", "vocab_size", 10**15),
        ("tokenizer/tokenizer_config.json", "extra_ids", 10**15),
        ("tokenizer/tokenizer_config.json", "added_tokens_decoder", []),
    ],
)
def test_a_config_names_the_file_and_the_key(
    tmp_path: Path, tiny: Callable[[str], Path], file: str, key: str, value: Any
) -> None:
    model = Path(shutil.copytree(tiny("2b"), tmp_path / "model"))
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CogtuneError) as caught:
        read_spec(model)
    assert caught.value.message.startswith(f"{path}: {key}")
    assert len(caught.value.message) < len(str(path)) + 250


def test_a_table_of_positions_has_a_limit(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    model = Path(shutil.copytree(tiny("2b"), tmp_path / "model"))
    path = model / "transformer" / "config.json"
    sides = {"sample_height": 4096, "sample_width": 4096, "sample_frames": 4096}  # each of them is allowed
    path.write_text(json.dumps(json.loads(path.read_text()) | sides))
    with pytest.raises(CogtuneError, match=r"config\.json: .*the table of positions is too large"):
        read_spec(model)


def test_all_that_is_wrong_with_a_model_is_told_at_once(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    model = Path(shutil.copytree(tiny("2b"), tmp_path / "model"))
    for file in ("transformer/config.json", "vae/config.json", "text_encoder/config.json"):
        values = json.loads((model / file).read_text())
        numbers = [key for key, value in values.items() if type(value) is int][:2]
        (model / file).write_text(json.dumps(values | dict.fromkeys(numbers, "x")))
    with pytest.raises(CogtuneError) as caught:
        read_spec(model)
    named = {detail.partition(": ")[0].removeprefix(f"{model}/") for detail in caught.value.details}
    assert named >= {"transformer/config.json", "vae/config.json"}


# ------------------------------------------------------------------------------------- a library's words


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


def test_advice_to_switch_a_safeguard_off_is_not_repeated(tmp_path: Path) -> None:
    import torch

    with (tmp_path / "optimizer.pt").open("wb") as file:
        torch.save({"a": Payload()}, file)
    with pytest.raises(pickle.UnpicklingError) as caught:
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert "weights_only" in str(caught.value)
    assert said_by(caught.value) == "Weights only load failed."
    with pytest.raises(CogtuneError) as told, loading(tmp_path):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert "weights_only" not in str(told.value)
    assert "trust" not in str(told.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("it is cut short", "it is cut short"),
        ("cut short. Set `trust_remote_code=True` to go on.", "cut short."),
        ("Object arrays cannot be loaded when allow_pickle=False", "ValueError"),
        ("\n\n first \n second", "first"),
        ("", "ValueError"),
        ("x" * 10_000, "x" * 400),
    ],
)
def test_what_is_told_of_a_librarys_error(said: str, told: str) -> None:
    assert said_by(ValueError(said)) == told


# ------------------------------------------------------------------------------------------- the terminal

UNSEEN = "\u009b31m\u007f\u202egnp.exe\u2066\u200f\u2028"


@pytest.mark.parametrize("where", ["say", "emit", "note", "warn", "error", "table"])
def test_no_character_that_a_terminal_obeys_is_printed(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", said)
    monkeypatch.setattr(sys, "stderr", said)
    show: dict[str, Callable[[], None]] = {
        "say": lambda: console.say(UNSEEN),
        "emit": lambda: console.emit({UNSEEN: [UNSEEN]}),
        "note": lambda: console.note(UNSEEN),
        "warn": lambda: console.warn(UNSEEN),
        "error": lambda: console.error(CogtuneError(UNSEEN, UNSEEN, details=[UNSEEN])),
        "table": lambda: console.table("", ("a",), [(UNSEEN,)]),
    }
    show[where]()
    said.flush()
    printed = said.buffer.getvalue().decode()
    assert not set(printed) & set(UNSEEN) - set("31mgnp.exe")
    assert "gnp.exe" in printed
    if where == "emit":
        assert json.loads(printed) == {UNSEEN: [UNSEEN]}


# ---------------------------------------------------------------------------------------- what the killed leave

_WRITER = """
import os, signal, sys
from pathlib import Path
from cogtune.system.files import write_atomic

def write(aside):
    aside.write_bytes(b"half")
    print(aside, flush=True)
    if "wait" in sys.argv:
        sys.stdin.read()
    else:
        os.kill(os.getpid(), signal.SIGKILL)

write_atomic(Path(sys.argv[1]), write)
"""


def killed_while_writing(path: Path) -> Path:
    """What a writer leaves that was killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-c", _WRITER, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    left = Path(done.stdout.strip())
    assert left.read_bytes() == b"half"
    return left


def test_a_report_is_written_over_what_a_killed_one_left(tmp_path: Path) -> None:
    left, other = killed_while_writing(tmp_path / "report.html"), killed_while_writing(tmp_path / "other.html")
    write_page(tmp_path / "report.html", "A page", [])
    assert not left.exists()
    assert other.exists()  # of another file, which someone else may be writing


def test_a_video_is_written_over_what_a_killed_one_left(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    left = killed_while_writing(tmp_path / "video.mp4")
    broken = tmp_path / "no-model"
    broken.mkdir()
    with pytest.raises(CogtuneError, match="no model_index"):  # even a run that goes no further
        generate(InferRequest(model=str(broken), prompts=("x",), output=tmp_path / "video.mp4"))
    assert not left.exists()


def test_launch_files_are_written_over_what_a_killed_run_left(tmp_path: Path, clips: Path) -> None:
    from cogtune.encoding import jobs
    from tests.support.runs_in_process import fill_here, plan_for

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "fill_cache", fill_here)
        plan: Plan = plan_for(clips, tmp_path / "out", steps=1)
    left = [killed_while_writing(tmp_path / "out" / "launch" / name) for name in ("plan.json", "rank-0.json")]
    launch.write_files(plan, "model: tiny:2b\n")
    assert not any(path.exists() for path in left)


def test_a_killed_write_of_what_is_known_of_clips_goes_with_the_next(tmp_path: Path) -> None:
    left = killed_while_writing(tmp_path / "files.json")
    for is_old in (False, True):
        if is_old:
            os.utime(left, (0, 0))
        facts = Facts(tmp_path / "files.json")
        facts.learn(tmp_path / "a.mp4", "digest", f"0{is_old}", (1, 1))
        facts.save()
        assert left.exists() != is_old  # another machine may be writing the new one


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "page.html"), "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        aside = Path(writer.stdout.readline().strip())
        remove_leftovers(tmp_path)
        remove_leftovers(tmp_path, "page.html")
        assert aside.exists()
        writer.stdin.close()
    assert writer.returncode == 0
    assert (tmp_path / "page.html").read_bytes() == b"half"


def test_a_load_that_fails_leaves_the_number_format(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers sets torch's own for the time that a model is made, and a config may end that time early."""
    folder = tmp_path / "transformer"
    shutil.copytree(tiny("2b") / "transformer", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": "four"}))
    with pytest.raises(CogtuneError, match="cannot load"), loading(folder):
        CogVideoXTransformer3DModel.from_pretrained(folder, dtype=torch.float16)
    assert torch.get_default_dtype() == torch.float32
