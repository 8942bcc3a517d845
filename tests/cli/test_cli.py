"""The command line: quick help without torch, errors in words, all of them at once."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from typer.main import get_command

from cogtune.cli import main
from cogtune.cli.app import app
from cogtune.cli.examples import EXAMPLES
from cogtune.config.presets import PRESETS
from cogtune.config.run_config import RunConfig
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.variants import VARIANTS
from cogtune.planning import fit
from cogtune.planning.estimate import estimate
from cogtune.planning.fit import Hardware
from cogtune.system.gpus import Gpu
from tests.conftest import Cogtune
from tests.support.in_process import run
from tests.support.sampling import sampled

COMMANDS = [
    [],
    ["dataset"],
    ["dataset", "validate"],
    ["dataset", "cache"],
    ["dataset", "bench"],
    ["train"],
    ["merge-zero"],
    ["infer"],
    ["lora"],
    ["lora", "convert"],
    ["doctor"],
    ["import"],
    ["push"],
    ["presets"],
    ["plan"],
    ["bench"],
    ["demo"],
    ["random-model"],
]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "deepspeed", "decord", "av", "numpy")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_needs_no_heavy_library(words: list[str]) -> None:
    """What keeps it quick; how quick is measured by hand, since a test's clock depends on what else runs."""
    program = (
        "import sys\nfrom cogtune.cli import main\n"
        "try:\n    main([*sys.argv[1:], '--help'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "Usage: cogtune" in done.stdout


def test_ctrl_c_is_quiet_from_the_first_import_on() -> None:
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name not in ('cogtune', 'cogtune.cli'):\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from cogtune.cli import main\n"
        "main(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_version_and_bare_call_tell_what_there_is(cogtune: Cogtune) -> None:
    assert "dataset" in cogtune("--help").out
    assert cogtune("--version").out == "cogtune 0.2.0\n"


def test_typos_get_the_nearest_word(command: Cogtune, tmp_path: Path) -> None:
    assert "--preset" in command("train", "--presett", "x", status=2).err
    assert "did you mean '4090-lora-5b'" in command("train", "--preset", "4090-lora-5", status=2).err
    assert "did you mean" in command("merge-zeros", status=2).err.lower()


def _choices(kind: Any) -> list[str]:
    """The values of a field that takes one of a few words."""
    parts = [kind] if get_origin(kind) is Literal else () if get_origin(kind) is tuple else get_args(kind)
    return [value for part in parts if get_origin(part) is Literal for value in get_args(part)]


CHOICES = {name: _choices(field.annotation) for name, field in RunConfig.model_fields.items()}


@pytest.mark.parametrize("name", [name for name, values in CHOICES.items() if values])
def test_a_flag_takes_every_word_of_its_field_and_names_them_all(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = f"--{name.replace('_', '-')}"
    told = run(capsys, "train", flag, "nonsense", status=2).err
    assert f"error: invalid value for '{flag}'" in told
    assert "'nonsense' is not one of" in told
    assert "Value error" not in told
    for value in CHOICES[name]:
        assert f"'{value}'" in told
        told_of = run(capsys, "train", flag, value, "--steps", "nonsense", status=2).err
        assert "error: invalid value for '--steps': input should be a valid integer" in told_of


def test_a_file_with_three_mistakes_gets_three_answers(command: Cogtune, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rnak: 64\nsteps: none\nstrategy: zero4\n")
    told = command("train", "--config", "run.yaml", status=2).err
    assert "3 errors in the configuration" in told
    assert "did you mean 'rank'?" in told
    assert "steps: " in told
    assert "strategy: " in told


def test_a_missing_dataset_is_told(command: Cogtune, tmp_path: Path) -> None:
    for words in (["dataset", "validate"], ["dataset", "cache", "--preset", "cpu-lora-tiny"]):
        told = command(*words, "nowhere", status=1).err
        assert "nowhere" in told
        assert "hint: " in told


def test_a_name_too_long_for_a_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["dataset", "validate", "caption " * 40])
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 2
    assert "caption caption" in capsys.readouterr().err


def test_an_unreadable_clip_is_told_and_stops_training(command: Cogtune, clips: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    (data / "videos" / "bad.mp4").write_bytes(b"no film at all" * 100)
    good = (clips / "videos.txt").read_text().splitlines()[0]
    (data / good).write_bytes((clips / good).read_bytes())
    (data / "videos.txt").write_text(f"videos/bad.mp4\n{good}\nvideos/lost.mp4\n")
    (data / "prompts.txt").write_text("one caption here\ntwo captions here\nthree captions here\n")
    ran = command("dataset", "validate", "data", "--preset", "cpu-lora-tiny", "--json", status=1)
    found = {
        finding["where"]: finding["code"]
        for finding in json.loads(ran.out)["findings"]
        if finding["severity"] == "error"
    }
    assert found == {"videos/bad": "not-a-video", "videos/lost": "missing-video"}
    told = command("train", "--preset", "cpu-lora-tiny", status=1).err
    assert "videos/bad" in told
    assert "videos/lost" in told
    assert not (tmp_path / "out" / "launch").exists()


def test_wrong_models_and_sizes_are_told_together(command: Cogtune, clips: Path) -> None:
    told = command(
        "train", "--preset", "cpu-lora-tiny", "--data", clips, "--size", "10x60x90", "--precision", "fp16",
        "--model", "tiny:5b", status=2,
    ).err  # fmt: skip
    assert "overflows in fp16" in told
    assert told.count("10x60x90") == 3
    told = command("train", "--model", "7b", "--data", clips, status=2).err
    assert "unknown model '7b'" in told


def test_a_model_that_cannot_be_downloaded_is_told(command: Cogtune, clips: Path) -> None:
    told = command("train", "--preset", "4090-lora-5b", "--data", clips, "--force", status=1).err
    assert "cannot download the model THUDM/CogVideoX-5b" in told
    assert "--model" in told


def test_presets_are_listed_and_shown(command: Cogtune) -> None:
    rows = json.loads(command("presets", "--json").out)
    assert len(rows) == len(PRESETS)
    assert rows[1] == {
        "preset": "4090-lora-5b",
        "hardware": "4090",
        "model": "5b",
        "type": "lora",
        "strategy": "ddp",
        "precision": "bf16",
        "size": "49x480x720",
        "guides' VRAM": "24 GB",
        "measured VRAM": rows[1]["measured VRAM"],
    }
    shown = command("presets", "8x4090-sft-2b-zero3").out
    assert "strategy\tzero3\tpreset 8x4090-sft-2b-zero3" in shown
    assert "seed\t42\tdefault" in shown


def test_presets_that_fit_this_machine_are_listed_with_what_they_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "cogtune" / "presets"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("model: 5b\nvram: 7GB\nprecision: bf16\n")
    (folder / "odd.yaml").write_text("model: 5b\nsize: 1x2x3\n")
    (folder / "none.yaml").write_text("model: tiny:6b\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    gpu = Gpu("NVIDIA GeForce RTX 4060", 8 * 10**9, 0)
    monkeypatch.setattr(fit, "local_hardware", lambda: Hardware((gpu,), 64 * 2**30))
    monkeypatch.setattr("cogtune.planning.free_memory.free_host_memory", lambda: 60 * 2**30)
    rows = json.loads(run(capsys, "presets", "--here", "--json").out)
    assert [row["preset"] for row in rows] == [
        "6gb-lora-2b", "8gb-lora-5b", "8gb-lora-5b-i2v", "12gb-sft-5b", "12gb-sft-5b-i2v", "cpu-lora-tiny",
        "cpu-sft-tiny", "mine",
    ]  # fmt: skip
    spec = published_spec(VARIANTS["5b"])
    needs = estimate(RunConfig.model_validate(PRESETS["8gb-lora-5b"].values()), spec)
    told = {key: rows[1][key] for key in ("model", "GPU memory", "host memory")}
    assert told == {"model": "5b", "GPU memory": f"{needs.memory.card / 1e9:.1f} GB", "host memory": "28 GiB"}
    monkeypatch.setattr("cogtune.planning.free_memory.free_host_memory", lambda: 20 * 2**30)
    (now,) = [row for row in json.loads(run(capsys, "presets", "--here", "--json").out) if row["preset"] == "mine"]
    assert now["host memory"] == "22 GiB"  # the least that there is
    listed = run(capsys, "presets", "--here")
    assert "this machine: 1 x NVIDIA GeForce RTX 4060 of 8.0 GB, 64 GiB of host memory" in listed.err
    assert "no preset" not in listed.err
    assert "odd is left out: invalid configuration; size 1x2x3: height 2 must be a multiple of 16" in listed.err
    assert "none is left out: `cogtune plan --preset none` reads the files of tiny:6b" in listed.err

    monkeypatch.setattr(fit, "local_hardware", lambda: Hardware((), 64 * 2**30))
    listed = run(capsys, "presets", "--here")
    assert [line.split("\t")[0] for line in listed.out.splitlines()] == ["preset", "cpu-lora-tiny", "cpu-sft-tiny"]
    assert "no preset of a published model fits" in listed.err
    assert "--here lists presets" in run(capsys, "presets", "8gb-lora-5b", "--here", status=2).err


def test_a_preset_of_ones_own_has_a_name_too(command: Cogtune, tmp_path: Path) -> None:
    folder = tmp_path / "config" / "cogtune" / "presets"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("model: 5b\nrank: 7\nsize: 49x480x720\n")
    (folder / "4090-lora-5b.yaml").write_text("rank: 9\n")  # a built-in name stays what it is
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    rows = json.loads(command("presets", "--json", env=env).out)
    assert len(rows) == len(PRESETS) + 1
    (folder / "broken.yaml").write_text("rank: [1\n")
    (folder / "typo.yml").write_text("rnak: 1\n")
    told = command("presets", env=env)
    assert "unknown key; did you mean 'rank'?" in told.err
    assert "broken.yaml line 2 is not valid YAML" in told.err
    assert "4090-lora-5b.yaml is ignored" in told.err
    assert "mine\tyour own" in told.out
    assert (rows[-1]["preset"], rows[-1]["hardware"], rows[-1]["size"]) == ("mine", "your own", "49x480x720")
    assert "rank\t7\tpreset mine" in command("presets", "mine", env=env).out
    assert "rank\t128\tpreset 4090-lora-5b" in command("presets", "4090-lora-5b", env=env).out
    assert "did you mean 'mine'" in command("plan", "--preset", "mime", env=env, status=2).err


FOREVER = """
import time

def forever():
    while True:  # a signal that comes just before a sleep is heard when that is over
        time.sleep(0.05)
"""


def ended(folder: Path, program: str, says: str, number: int) -> tuple[int, str, str]:
    """Send a program a signal once it has said its first line; its status, the rest that it prints, and its errors."""
    (folder / "program.py").write_text(program)
    running = subprocess.Popen(
        [sys.executable, folder / "program.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == says
    running.send_signal(number)
    out, err = running.communicate(timeout=600)
    return running.returncode, out, err


HALF_WRITTEN = f"""{FOREVER}
import sys
from pathlib import Path
import cogtune.cli
from cogtune.system.folders import written_folder

def work(*_):
    with written_folder(Path(sys.argv[1])):
        print("at work", flush=True)
        forever()

cogtune.cli._status = work
cogtune.cli.main([])
"""


def test_what_is_terminated_leaves_nothing_half_written(tmp_path: Path) -> None:
    running = subprocess.Popen([sys.executable, "-c", HALF_WRITTEN, tmp_path / "merged"], stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert running.stdout.readline() == b"at work\n"
    running.terminate()
    assert running.wait(600) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    running.stdout.close()


SWALLOWED = f"""{FOREVER}
import cogtune.cli
from cogtune.cli import signals

def work(*_):
    for _ in range(3):
        try:
            print("at work", flush=True)
            forever()
        except BaseException:
            pass
    class Odd:
        def __del__(self):
            forever()
    Odd()
    try:
        print("at work", flush=True)
        forever()
    finally:
        time.sleep(1)
        print("in good order", flush=True)

signals._INSISTS = 0.2
cogtune.cli._status = work
cogtune.cli.main([])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_library_keeps_the_program_from_ending(number: int, tmp_path: Path) -> None:
    """Each swallows what one signal raises; and it leaves in peace, though that takes longer than it insists."""
    assert ended(tmp_path, SWALLOWED, "at work\n", number) == (128 + number, "at work\n" * 3 + "in good order\n", "")


REPEATED_AT_THE_END = f"""{FOREVER}
import atexit, threading
import cogtune.cli
from cogtune.cli import signals

class Late(threading.Event):
    def set(self):
        signals._ended.wait()
        time.sleep(0.5)  # the program goes on to its end, if it does not wait for this thread
        super().set()

def work(*_):
    print("at work", flush=True)
    try:
        forever()
    except BaseException:
        time.sleep(0.5)  # until the signal is about to be sent again
        raise

atexit.register(time.sleep, 2)
signals._INSISTS, signals._again = 0.1, Late()
cogtune.cli._status = work
cogtune.cli.main([])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_repeated_as_the_program_ends_changes_nothing(number: int, tmp_path: Path) -> None:
    assert ended(tmp_path, REPEATED_AT_THE_END, "at work\n", number) == (128 + number, "", "")


SLOW_TO_END = f"""{FOREVER}
import atexit
import cogtune.cli

def ending():
    print("ending", flush=True)
    forever()

def work(*_):
    atexit.register(ending)
    print("no newline, ", end="")
    return 7

cogtune.cli._status = work
cogtune.cli.main([])
"""


def test_ctrl_c_while_the_program_ends_cuts_that_short(tmp_path: Path) -> None:
    assert ended(tmp_path, SLOW_TO_END, "no newline, ending\n", signal.SIGINT) == (7, "", "")


def test_a_cache_that_cannot_be_written_is_told_with_what_puts_it_elsewhere(
    command: Cogtune, clips: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(clips, data, ignore=shutil.ignore_patterns(".cogtune"))
    (data / ".cogtune").touch()
    for words in (["dataset", "cache", data], ["train", "--data", data]):
        told = command(*words, "--preset", "cpu-lora-tiny", status=1).err
        assert f"error: cannot write {data / '.cogtune'}" in told
        assert "put the cache elsewhere with --cache-dir" in told


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cogtune", "train", "--preset", "nix", "--debug"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert done.returncode == 1


def test_infer_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no base model: --model is missing" in run(capsys, "infer", "--prompt", "x", status=2).err
    assert "no such file or folder: nowhere" in run(capsys, "infer", "--lora", "nowhere", status=2).err
    told = run(capsys, "infer", "--model", "tiny:5b-i2v", "--size", "8x64x96", status=2).err
    assert "--prompt" in told
    assert "--image" in told
    assert "--size" in told
    assert ".mp4, .webp, .gif" in run(capsys, "infer", "--output", "x.avi", status=2).err


def test_infer_refuses_numbers_without_end(capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "infer", "--lora-scale", "1,nan", "--guidance", "inf", "--fps", "inf", status=2).err
    assert [name for name in ("--lora-scale: nan", "--guidance: inf", "--fps: inf") if name not in told] == []
    assert "--seed" in run(capsys, "infer", "--seed", "-1", status=2).err
    assert "--seed" in run(capsys, "infer", "--seed", 2**63, status=2).err


def test_an_unknown_preset_is_sent_to_the_list(command: Cogtune) -> None:
    told = command("presets", "4090-lora-5", status=2).err
    assert "did you mean '4090-lora-5b'" in told
    assert "run `cogtune presets` to list all presets" in told


def test_the_help_of_merge_zero_shows_its_defaults(command: Cogtune) -> None:
    shown = command("merge-zero", "--help", env={"COLUMNS": "200"}).out
    assert "[default: CHECKPOINT-merged]" in shown
    assert "[default: the run's]" in shown


def test_a_file_name_cannot_command_the_terminal(tmp_path: Path, cogtune: Cogtune) -> None:
    for name in (b"\x1b[31mred", b"latin-\xe9"):
        (tmp_path / os.fsdecode(name + b".mp4")).touch()
        (tmp_path / os.fsdecode(name + b".txt")).write_text("A caption.")
    (tmp_path / os.fsdecode(b"stray-\xe9.txt")).touch()
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    shown = cogtune("dataset", "validate", tmp_path, status=1, env=strict).out
    assert "\\x1b[31mred" in shown
    assert "stray-\\udce9.txt" in shown
    assert "\x1b" not in shown
    found = json.loads(cogtune("dataset", "validate", tmp_path, "--json", status=1, env=strict).out)["findings"]
    assert {os.fsencode(one["where"]) for one in found} >= {b"\x1b[31mred", b"stray-\xe9.txt"}
    ascii_only = {"PYTHONIOENCODING": "ascii:strict"}
    (tmp_path / "\U0001f600.mp4").touch()
    assert "\\U0001f600" in cogtune("dataset", "validate", tmp_path, status=1, env=ascii_only).out
    found = json.loads(cogtune("dataset", "validate", tmp_path, "--json", status=1, env=ascii_only).out)["findings"]
    assert "\U0001f600" in {one["where"] for one in found}
    refused = cogtune("dataset", "cache", tmp_path, "--model", "tiny:2b", status=1, env=strict).err
    assert "\\x1b[31mred.mp4 is empty" in refused
    assert "\x1b" not in refused


def commands(at: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group of the program, by the words that call it."""
    at = at or get_command(app)
    yield words, at
    for name, below in getattr(at, "commands", {}).items():
        yield from commands(below, (*words, name))


def once() -> list[tuple[str, ...]]:
    """The words that call each command with each of its options that take no several values given twice."""
    found = []
    for words, command in commands():
        for option in command.params:
            if option.param_type_name == "option" and not option.multiple and option.name != "help":
                value = () if option.is_flag else ("1",)
                found.append((*words, option.opts[0], *value, option.opts[-1], *value))
    return found


@pytest.mark.slow
def test_an_option_given_twice_is_refused_by_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.main.get_command", cache(get_command))  # the same commands for all cases
    cases = once()
    assert len(cases) > 300
    assert ("infer", "--model", "1", "--model", "1") in cases
    for words in cases:
        name = next(word for word in words if word.startswith("--"))
        if name in ("--debug", "--quiet"):  # taken out wherever they stand
            continue
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        told = capsys.readouterr().err
        assert caught.value.code == 2, (words, told)
        assert told.startswith(f"error: given more than once: {name}\n"), (words, told)


def test_all_options_given_twice_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["infer", "--model", "a", "--steps", "2", "--model", "b", "--steps", "3", "--seed", "1"])
    assert "given more than once: --model, --steps\n" in capsys.readouterr().err


def test_options_of_several_values_may_be_given_several_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_status(
        ["plan", "--model", "tiny:2b", "--target-modules", "to_q", "--target-modules", "no", "--strategy", "ddp"]
    )
    told = capsys.readouterr().err
    assert "target_modules no: no layer has this name" in told
    assert "more than once" not in told


def main_status(words: list[str]) -> object:
    """The exit status of the program."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    return caught.value.code


def test_every_command_ends_its_help_with_examples_that_it_would_take() -> None:
    leaves = {" ".join(words): command for words, command in commands() if not getattr(command, "commands", None)}
    assert set(leaves) == set(EXAMPLES)
    for name, examples in EXAMPLES.items():
        assert 2 <= len(examples) <= 3, name
        assert all(example in leaves[name].epilog for example in examples)
        for example in examples:
            words = shlex.split(example)
            assert words[: 1 + len(name.split())] == ["cogtune", *name.split()]
            leaves[name].make_context(name, words[1 + len(name.split()) :])  # raises for what it does not take


@pytest.mark.parametrize(
    ("level", "warned"), sampled([("error", False), ("", False), ("warning", True)], ("error", False), ("", False))
)
def test_a_first_use_of_a_tiny_model_shows_no_librarys_warning(
    level: str, warned: bool, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making the model imports DeepSpeed, which warns where there is no GPU; "error" is what a child inherits."""
    monkeypatch.setenv("COGTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DEEPSPEED_LOG_LEVEL", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if level:
        monkeypatch.setenv("DEEPSPEED_LOG_LEVEL", level)
    words = ("dataset", "validate", str(clips), "--model", "tiny:2b", "--size", "9x64x96")
    ran = subprocess.run([sys.executable, "-m", "cogtune", *words], capture_output=True, text=True, check=True)
    assert ("Setting accelerator to CPU" in ran.stderr) == warned
