"""Configuration: preset < file < flag, every value with its source, all mistakes at once."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from cogtune.config.presets import CARDS_GB, PRESETS
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.run.run_yaml import read_run
from cogtune.system.errors import CogtuneError, UsageError

TABLE = [row for row in PRESETS.values() if row.promised_gb is not None]


def test_a_flag_beats_the_file_which_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: 4090-lora-5b\nrank: 64\nlearning_rate: 3e-4\n")
    resolved = resolve(file=file, flags={"rank": 16})
    config = resolved.config
    assert (config.rank, config.learning_rate, config.model) == (16, 3e-4, "THUDM/CogVideoX-5b")
    assert resolved.provenance["rank"] == "--rank"
    assert resolved.provenance["learning_rate"] == str(file)
    assert resolved.provenance["model"] == "preset 4090-lora-5b"
    assert resolved.provenance["seed"] == "default"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("rnak: 3\nsteps: -1\nprecision: bf61\nsize: 49x480\npreset: 4090-lora-5\n")
    with pytest.raises(UsageError) as caught:
        resolve(file=file)
    told = "\n".join(caught.value.details)
    assert len(caught.value.details) == 5
    assert "did you mean '4090-lora-5b'" in told
    assert "rnak: unknown key; did you mean 'rank'?" in told
    assert "steps: input should be greater than or equal to 1, not -1" in told
    assert "precision: input should be 'bf16', 'fp16' or 'fp32', not 'bf61'" in told
    assert "size: '49x480' is not a size" in told
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("text", "why"), [("a: [", "line 1 is not valid YAML"), ("- 1", "contains a list, not keys")])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=why):
        resolve(file=file)


DOUBLING = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)

UNTRUSTED = {
    "a key twice": (
        "rank: 4\nalpha: 8\nrank: 64\n",
        "line 3 is not valid YAML: duplicate key rank, first in line 1",
    ),
    "a key twice in one line": ("{rank: 4, rank: 5}", "line 1 is not valid YAML: duplicate key rank"),
    "aliases that double": (DOUBLING, "line 2 is not valid YAML: aliases are not supported"),
    "an alias to itself": ("a: &a [*a]", "line 1 is not valid YAML: aliases are not supported"),
    "a merge of keys": ("a: &a {rank: 4}\n<<: *a\n", "line 2 is not valid YAML: aliases are not supported"),
    "nested too deep": ("a: " + "[" * 5000, "is not valid YAML: nested too deeply"),
    "half a character": ('id_token: "\\ud800"', "it contains a lone surrogate"),
    "an object of Python": ("a: !!python/object/apply:os.getcwd []", "line 1 is not valid YAML"),
    "too large": ("#" * (1 << 20) + "\n", "is too large: 1,048,576 bytes are the most that is read"),
}


@pytest.mark.parametrize("what", UNTRUSTED)
def test_a_file_that_may_not_be_trusted_is_refused_by_name(what: str, tmp_path: Path) -> None:
    text, why = UNTRUSTED[what]
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(CogtuneError, match=re.escape(why)) as caught:
        resolve(file=file)
    assert caught.value.message.startswith(f"{file} ")


def test_a_pipe_or_a_device_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.yaml")
    for path in (tmp_path / "x.yaml", Path("/dev/zero")):
        with pytest.raises(CogtuneError, match="is not an ordinary file"):
            resolve(file=path)


def test_a_run_yaml_that_was_cut_short_never_gives_defaults(tmp_path: Path) -> None:
    first = resolve(flags={"learning_rate": 0.005, "keep_checkpoints": 50, "tracker": ["wandb"], "output": tmp_path})
    text = first.to_yaml()
    (tmp_path / "run.yaml").write_text(text)
    assert read_run(tmp_path) == first
    lines = [at for at, character in enumerate(text) if character == "\n"]
    cuts = {
        *range(0, len(text), 211),
        *range(len(text) - 30, len(text)),
        *lines[::9],
        *(at + 1 for at in lines[1:-1:9]),
    }
    for cut in sorted(cuts):
        (tmp_path / "run.yaml").write_text(text[:cut])
        with pytest.raises(CogtuneError) as caught:
            read_run(tmp_path)
        assert str(tmp_path / "run.yaml") in caught.value.message
    (tmp_path / "run.yaml").write_text(text[: lines[10]] + "\n")
    with pytest.raises(CogtuneError, match=r"run\.yaml is truncated, or was written by another version: ") as caught:
        read_run(tmp_path)
    assert "from 'config' in a checkpoint's state.json" in caught.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CogtuneError, match="cannot read"):
        resolve(file=tmp_path / "none.yaml")


def test_characters_that_turn_text_are_spelled_out_in_run_yaml(tmp_path: Path) -> None:
    for token, shown in (("\u202egnp.exe\u2066", r'"\u202Egnp.exe\u2066"'), ("帆船", "帆船")):
        resolved = resolve(flags={"id_token": token})
        (tmp_path / "run.yaml").write_text(resolved.to_yaml())
        assert f"id_token: {shown}  #" in resolved.to_yaml()
        assert resolve(file=tmp_path / "run.yaml").config == resolved.config


def test_a_written_run_reads_back_the_same(tmp_path: Path) -> None:
    resolved = resolve(preset_name="cpu-lora-tiny", flags={"id_token": "sks: #1", "epsilon": 1e-8, "fps": 7.5})
    (tmp_path / "run.yaml").write_text(resolved.to_yaml())
    assert read_run(tmp_path).config == resolved.config.model_copy(update={"output": tmp_path})
    assert "  # --id-token" in resolved.to_yaml()
    assert "pin_memory: false  # --no-pin-memory" in resolve(flags={"pin_memory": False}).to_yaml()


def test_a_preset_does_not_start_from_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: 4090-lora-5b\nrank: 8\n")
    assert resolve(file=file).config.rank == 8
    with pytest.raises(UsageError) as caught:
        resolve(preset_name=str(file))
    assert "pass this file as --config" in caught.value.details[0]


def test_a_run_that_goes_on_keeps_where_each_value_came_from(tmp_path: Path) -> None:
    awkward = {"id_token": "two  # lines\nof it", "validation_prompts": "a {fox}: 1\n\n# b"}
    first = resolve(preset_name="cpu-lora-tiny", flags={"rank": 4, "output": tmp_path, **awkward})
    (tmp_path / "run.yaml").write_text(first.to_yaml())
    assert read_run(tmp_path) == first
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    again = read_run(moved, {"steps": 7})
    assert again.config.output == moved
    assert again.provenance == {**first.provenance, "steps": "--steps"}
    file = moved / "run.yaml"
    file.write_text(file.read_text().replace("rank: 4  # --rank", "rank: 9"))  # by hand
    assert read_run(moved).provenance["rank"] == str(moved / "run.yaml")


def test_every_field_says_what_it_does_and_where_it_belongs() -> None:
    for name, field in RunConfig.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict), name
        assert field.json_schema_extra["panel"]


def test_epochs_count_samples_over_all_processes() -> None:
    config = resolve(flags={"epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2, "num_processes": 2}).config
    assert config.global_batch == 8
    assert config.total_steps(20) == 8  # 60 samples in steps of 8, the last one filled up
    assert resolve(flags={"steps": 7}).config.total_steps(20) == 7


def test_the_table_has_26_rows_and_each_parses() -> None:
    assert len(TABLE) == 26
    for row in TABLE:
        config = resolve(preset_name=row.name).config
        assert config.size == str(row.size)
        assert config.num_processes == row.gpus


def test_every_card_can_hold_what_the_guides_promise() -> None:
    for row in TABLE:
        assert row.promised_gb is not None
        assert row.promised_gb <= CARDS_GB[row.card], row.name


def test_the_table_in_figures() -> None:
    """The guides' table, row by row: what a preset of that name promises."""
    promised = [row.promised_gb for row in TABLE]
    assert promised == [16, 24, 24, 35, 35, 36, 17, 17, 19, 14, *[42] * 4, 43, 43, 28, 28, 56, 56, *[55] * 4, 40, 40]
    assert [row.gpus for row in TABLE].count(8) == 15
    assert {row.precision for row in TABLE if row.model != "2b"} == {"bf16"}
    assert [row.name for row in TABLE if row.precision == "fp16"] == [
        "4080-lora-2b",
        "a100-sft-2b",
        "4090-sft-2b-zero2-offload",
        "8x4090-sft-2b-zero2",
        "8x4090-sft-2b-zero3",
    ]


def test_a_preset_of_ones_own_is_a_file_of_the_same_keys(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(PRESETS["4090-lora-5b"].values() | {"rank": 32}))
    assert resolve(preset_name=str(mine)).config.rank == 32


def test_paths_are_anchored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve().config.with_absolute_paths()
    assert config.data == tmp_path / "data"
    assert config.cache_dir == tmp_path / "data" / ".cogtune"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"size": "0x0x0"}, "size: a size has positive parts: 0x0x0 (FILE)"),
        ({"size": "9x9"}, "size: '9x9' is not a size; write frames x height x width, such as 49x480x720 (FILE)"),
        ({"output": 5}, "output: input should be a path, not 5 (FILE)"),
        ({"cache_dir": ["a"]}, "cache_dir: input should be a path, not ['a'] (FILE)"),
        ({"target_modules": 7}, "target_modules: input should be a list of names, not 7 (FILE)"),
        ({"target_modules": ","}, "target_modules: input should be a list of names, not () (FILE)"),
        ({"steps": "none"}, "steps: input should be a whole number, not 'none' (FILE)"),
        ({"learning_rate": "fast"}, "learning_rate: input should be a number, not 'fast' (FILE)"),
        ({"fps": True}, "fps: input should be a number, not true (FILE)"),
        ({"seed": False}, "seed: input should be a number, not false (FILE)"),
        ({"seed": 2**31}, "seed: input should be less than or equal to 2147483647, not 2147483648 (FILE)"),
        (
            {"steps": 10, "warmup_steps": 10},
            "warmup_steps: 10 must be less than the run's 10 steps, or the learning rate never reaches its peak (FILE)",
        ),
    ],
)
def test_each_mistake_is_told_once_and_in_words(tmp_path: Path, values: dict[str, object], told: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError) as caught:
        resolve(file=file)
    assert caught.value.details == (told.replace("FILE", str(file)),)


def test_a_file_in_another_encoding_or_a_folder_is_told(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"rank: 4\nid_token: caf\xe9\n")
    with pytest.raises(UsageError, match=r"x\.yaml line 2 is not UTF-8"):
        resolve(file=file)
    with pytest.raises(UsageError, match="is a folder, not a YAML file") as caught:
        resolve(file=tmp_path)
    assert str(tmp_path / "run.yaml") in caught.value.hint
    file.write_text("id_token: 2024-13-45\n")
    with pytest.raises(UsageError, match="is not valid YAML: month must be in"):
        resolve(file=file)


def test_steps_as_a_flag_put_weaker_epochs_aside(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("steps: 1000\nepochs: 3\n")
    assert resolve(file=file).config.epochs == 3
    resolved = resolve(file=file, flags={"steps": 7})
    assert resolved.config.total_steps(20) == 7
    assert (resolved.config.epochs, resolved.provenance["epochs"]) == (None, "--steps")
    file.write_text(resolved.to_yaml())
    assert resolve(file=file).config == resolved.config
    assert resolve(file=file, flags={"epochs": 2}).config.epochs == 2


def test_a_size_buckets_and_frames_given_later_put_the_others_aside(tmp_path: Path) -> None:
    preset = ["49x480x720", "4090-lora-5b"]
    assert resolve(preset_name=preset[1]).config.size == preset[0]
    buckets = resolve(preset_name=preset[1], flags={"buckets": ["49x480x720, 25X512x512", "49x480x720"]})
    assert (buckets.config.buckets, buckets.config.size) == (("49x480x720", "25x512x512"), None)
    assert buckets.provenance["size"] == "--buckets"
    file = tmp_path / "run.yaml"
    file.write_text(buckets.to_yaml())
    assert resolve(file=file).config == buckets.config
    again = resolve(file=file, flags={"size": "9x64x96"}).config
    assert (again.size, again.buckets) == ("9x64x96", ())
    fewer = resolve(preset_name=preset[1], flags={"frames": 25})
    assert (fewer.config.size, fewer.config.frames) == (preset[0], 25)
    file.write_text(fewer.to_yaml())
    assert resolve(file=file, flags={"size": "9x64x96"}).config.frames is None
    with pytest.raises(UsageError) as caught:
        resolve(flags={"size": "9x64x96", "buckets": "9x64x96", "frames": 9})
    told = "\n".join(caught.value.details)
    assert "--size cannot be used with --buckets" in told
    assert "--frames cannot be used with --buckets" in told
    file.write_text("buckets: [49x480x720]\nframes: 9\n")
    with pytest.raises(UsageError) as caught:
        resolve(file=file)
    assert "cannot be used with frames 9: buckets have their own numbers of frames" in caught.value.details[0]


def test_steps_and_epochs_together_are_a_mistake_among_others() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(flags={"steps": 7, "epochs": 2, "rank": 0})
    told = "\n".join(caught.value.details)
    assert "--steps cannot be used with --epochs" in told
    assert "rank: " in told


def test_warmup_may_be_longer_than_steps_that_epochs_replace() -> None:
    assert resolve(flags={"epochs": 2, "warmup_steps": 5000}).config.warmup_steps == 5000


def test_names_in_one_word_are_split_at_commas(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("target_modules: to_q, to_k\n")
    assert resolve(file=file).config.target_modules == ("to_q", "to_k")
    assert resolve(flags={"target_modules": ["to_q,to_k", "to_v"]}).config.target_modules == ("to_q", "to_k", "to_v")


def test_anchored_paths_have_no_way_back_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    config = resolve(flags={"data": "../data", "output": "../out", "model": "../model"}).config.with_absolute_paths()
    assert (config.data, config.output, config.model) == (tmp_path / "data", tmp_path / "out", str(tmp_path / "model"))
    assert config.cache_dir == tmp_path / "data" / ".cogtune"


def test_a_run_of_cogtune_0_1_may_name_the_sidecar_layout_as_it_was_called(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("format: beside\n")
    assert resolve(file=file).config.format == "sidecar"
