"""``cogtune import``: scripts in the manner of five programs become configurations that ``cogtune plan`` takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogtune.cli import _status
from cogtune.commands import importing
from cogtune.config.importers import Imported, read, translate
from cogtune.config.importers.flags import BETTER, DEFAULTS, KEPT, KNOWN, NOTHING, TOGETHER
from cogtune.config.importers.shell import Script, follow
from cogtune.config.run_config import RunConfig
from cogtune.system.errors import CogtuneError, UsageError
from tests.support.in_process import run

COGVIDEO = """#!/usr/bin/env bash
export TOKENIZERS_PARALLELISM=false
MODEL=(
    --model_path "THUDM/CogVideoX1.5-5B-I2V"  # or another
    --model_name "cogvideox1.5-i2v"
    --model_type "i2v"
    --training_type "{kind}"
)
DATA=(
    --data_root "clips"
    --caption_column "prompt.txt"
    --video_column "videos.txt"
    # --image_column "images.txt"
    --train_resolution "81x768x1360"
    --output_dir "runs/boats"
    --report_to "tensorboard"
)
TRAIN=(
    --train_epochs 10
    --batch_size 1
    --gradient_accumulation_steps 2
    --mixed_precision "bf16"
    --seed 7
    --num_workers 8
    --pin_memory True
    --nccl_timeout 1800
    --checkpointing_steps 20
    --checkpointing_limit 2
)
VALIDATION=(
    --do_validation {validation}
    --validation_dir "val"
    --validation_steps 40
    --validation_prompts "prompts.txt"
    --validation_images "images.txt"
    --gen_fps 16
)
accelerate launch {launch} train.py \\
    "${{MODEL[@]}}" \\
    "${{DATA[@]}}" "${{TRAIN[@]}}" \\
    "${{VALIDATION[@]}}"
"""

ACCELERATE = """
num_processes: 8
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: configs/zero.yaml
"""

COGKIT = """
name4train: "boats"
log_level: "INFO"
model_name: "cogvideox-t2v"
model_path: "THUDM/CogVideoX-5b"
output_dir: "runs/boats"
report_to: null
data_root: "clips"
seed: 42
training_type: "sft"
strategy: "SHARD_GRAD_OP"  # as FSDP calls it
offload_params_grads: true
no_grad_sync_when_accumulating: false
enable_packing: false
train_resolution: [49, 480, 720]
train_epochs: 3
batch_size: 1
gradient_accumulation_steps: 1
mixed_precision: "bf16"
learning_rate: 1.0e-5
num_workers: 8
pin_memory: true
checkpointing_steps: 10
checkpointing_limit: 2
resume_from_checkpoint: null
do_validation: true
validation_steps: 10
gen_fps: 8
"""

DIFFUSERS = """
export MODEL_PATH="THUDM/CogVideoX-2b"
export CUDA_VISIBLE_DEVICES=0,1
accelerate launch --multi_gpu --main_process_port 29501 examples/cogvideo/train_cogvideox_lora.py \\
  --pretrained_model_name_or_path $MODEL_PATH --revision main --cache_dir ~/hub \\
  --instance_data_root clips --caption_column prompts.txt --video_column videos.txt --id_token BOAT \\
  --validation_prompt "BOAT one ship:::BOAT two 'ships'" --validation_prompt_separator ::: \\
  --num_validation_videos 2 --validation_epochs 10 --guidance_scale 5 --use_dynamic_cfg \\
  --seed 42 --rank 64 --lora_alpha 32 --mixed_precision fp16 --output_dir "runs/$(date +%s)" \\
  --height 480 --width 720 --fps 8 --max_num_frames 50 --skip_frames_start 3 --skip_frames_end 4 \\
  --random_flip --train_batch_size 1 --num_train_epochs 30 --max_train_steps 900 --checkpointing_steps 1000 \\
  --gradient_accumulation_steps 1 --gradient_checkpointing --learning_rate 1e-3 --scale_lr \\
  --lr_scheduler cosine_with_restarts --lr_warmup_steps 200 --lr_num_cycles 2 --enable_slicing --enable_tiling \\
  --optimizer Adam --adam_beta1 0.9 --adam_beta2 0.95 --adam_weight_decay 1e-3 --adam_epsilon 1e-7 \\
  --max_grad_norm 1.0 --allow_tf32 --push_to_hub --hub_token hf_secretsecretsecret --report_to comet_ml
"""

FACTORY = """
GPU_IDS="0"
RATES=("1e-4" "1e-3")
OPTIMIZERS=("adamw")
CONFIG="accelerate_configs/uncompiled_1.yaml"
for rate in "${RATES[@]}"; do
  for optimizer in "${OPTIMIZERS[@]}"; do
    out="./run__${optimizer}__${rate}/"
    cmd="accelerate launch --config_file $CONFIG --gpu_ids $GPU_IDS training/cogvideox_image_to_video_sft.py \\
      --pretrained_model_name_or_path /models/CogVideoX1.5-5B-I2V \\
      --data_root clips --dataset_file clips/table.csv --caption_column text --video_column path \\
      --height_buckets 480 768 --width_buckets 720 --frame_buckets 77 --load_tensors --pin_memory \\
      --validation_prompt \\"A ship's horn, loud:::another\\" --validation_images \\"a.png:::b.png\\" \\
      --validation_epochs 1 --seed 42 --mixed_precision bf16 --output_dir $out --train_batch_size 1 \\
      --max_train_steps 20000 --gradient_checkpointing --learning_rate $rate --noised_image_dropout 0.05 \\
      --lr_scheduler constant --lr_warmup_steps 800 --optimizer $optimizer --beta1 0.9 --beta2 0.95 \\
      --weight_decay 0.001 --enable_model_cpu_offload --nccl_timeout 600"
    echo "Running: $cmd"
    eval $cmd
  done
done
"""

FINETRAINERS = """#!/bin/bash
set -e -x
BACKEND="ptd"
GPUS=2
DDP_2="--parallel_backend $BACKEND --pp_degree 1 --dp_degree 2 --dp_shards 1 --cp_degree 1 --tp_degree 1"
parallel_cmd=( $DDP_2 )
# something we've to improve
rest=(
  --model_name "cogvideox" --pretrained_model_name_or_path "THUDM/CogVideoX-5b"
  --dataset_config lists/training.json --enable_precomputation --precomputation_items 25
  --flow_weighting_scheme "logit_normal" --training_type "lora" --seed 42 --batch_size 1 --train_steps 300
  --rank 32 --lora_alpha 32 --target_modules "(transformer_blocks|single_blocks).*(to_q|to_k|ff.net.2)"
  --checkpointing_steps 100 --checkpointing_limit 2 --optimizer "adamw" --lr 5e-5
  --lr_scheduler "constant_with_warmup" --lr_warmup_steps 1000 --beta1 0.9 --beta2 0.99 --weight_decay 1e-4
  --validation_dataset_file lists/validation.json --validation_steps 50
  --tracker_name "boats" --output_dir "runs/boats" --init_timeout 600 --nccl_timeout 600
)
if [ "$BACKEND" == "accelerate" ]; then
  if [ "$GPUS" == 2 ]; then CONFIG="two.yaml"; fi
  accelerate launch --config_file "$CONFIG" train.py "${rest[@]}"
elif [ "$BACKEND" == "ptd" ]; then
  torchrun --standalone --nnodes=1 --nproc_per_node=$GPUS train.py \\
    "${parallel_cmd[@]}" "${rest[@]}"
fi
"""


def imported(folder: Path, text: str, name: str = "train.sh", **options: Any) -> Imported:
    (folder / name).write_text(text)
    return importing.import_run(folder / name, folder / "run.yaml", **options)


def said(made: Imported) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for remark in made.remarks:
        found.setdefault(remark.flag, []).append((remark.kind, remark.text))
    return found


def cogvideo(kind: str = "lora", validation: str = "false", launch: str = "--num_processes 2") -> str:
    return COGVIDEO.format(kind=kind, validation=validation, launch=launch)


def test_cogvideos_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.sh").write_text(cogvideo())
    ran = run(capsys, "import", tmp_path / "train.sh", "--output", tmp_path / "run.yaml")
    assert "treats any value as true" in ran.out  # of `--do_validation false`
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert values == {
        "model": "THUDM/CogVideoX1.5-5B-I2V",
        "precision": "bf16",
        "data": "clips",
        "size": "81x768x1360",
        "sampling": "uniform",
        "type": "lora",
        "epochs": 10,
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "seed": 7,
        "alpha": 64,
        "learning_rate": 2e-5,
        "warmup_steps": 100,
        "output": "runs/boats",
        "checkpoint_every": 20,
        "keep_checkpoints": 2,
        "tracker": ["tensorboard"],
        "num_processes": 2,
        "nccl_timeout": 30.0,
    }
    assert "alpha: 64  # default of --lora_alpha of CogVideo\n" in (tmp_path / "run.yaml").read_text()
    assert "each GPU: weights" in run(capsys, "plan", "--config", tmp_path / "run.yaml").out
    assert (
        "already exists"
        in run(capsys, "import", tmp_path / "train.sh", "--output", tmp_path / "run.yaml", status=2).err
    )


@pytest.mark.parametrize(
    ("zero", "strategy"),
    [
        ({"stage": 2}, "zero2"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "zero2-offload"),
        ({"stage": 3}, "zero3"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "zero3-offload"),
    ],
)
def test_cogvideos_zero_configs(zero: dict[str, Any], strategy: str, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "zero.yaml").write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto"}))
    (tmp_path / "accelerate.yaml").write_text(ACCELERATE)
    text = cogvideo("sft", "true", "--config_file accelerate.yaml")
    made = imported(tmp_path, text)
    assert (made.values["strategy"], made.values["num_processes"]) == (strategy, 8)
    assert made.values["validation_prompts"] == str(Path("val") / "prompts.txt")
    assert made.values["validation_images"] == str(Path("val") / "images.txt")
    assert made.values["sample_every"] == 40
    assert "alpha" not in made.values
    lora = imported(tmp_path, text.replace("sft", "lora"), force=True)
    assert lora.values["strategy"] == "ddp"
    assert "`vram` keeps a run" in said(lora)["--config_file accelerate.yaml"][0][1]


def test_a_deepspeed_file_that_is_not_here_is_a_thing_to_do(tmp_path: Path) -> None:
    (tmp_path / "accelerate.yaml").write_text(ACCELERATE.replace("zero.yaml", "zero3_offload.yaml"))
    made = imported(tmp_path, cogvideo("sft", launch="--config_file accelerate.yaml"))
    assert made.values["strategy"] == "zero3-offload"
    assert said(made)["deepspeed_config_file"][0][0] == "to do"


def test_cogkits_configuration(tmp_path: Path) -> None:
    made = imported(tmp_path, COGKIT, "config.yaml")
    assert made.values["strategy"] == "zero2-offload"
    assert made.values["data"] == str(Path("clips") / "train")
    assert (made.values["size"], made.values["type"], made.values["epochs"]) == ("49x480x720", "sft", 3)
    assert said(made)["--do_validation"][1][0] == "to do"
    assert said(made)["GPUs"][0][0] == "to do"


def test_cogkits_prompts_are_read_from_its_test_data(tmp_path: Path) -> None:
    (tmp_path / "clips" / "test").mkdir(parents=True)
    (tmp_path / "clips" / "test" / "metadata.jsonl").write_text('{"prompt": "a ship"}\n{"prompt": "a boat"}\n')
    text = COGKIT.replace('"clips"', f'"{tmp_path / "clips"}"')
    (tmp_path / "config.yaml").write_text(text)
    made = imported(tmp_path, "torchrun --nproc_per_node=[number of GPUs] ../train.py --yaml config.yaml\n")
    assert made.values["validation_prompts"] == "a ship:::a boat"
    assert made.values["sample_every"] == 10
    assert said(made)["script"] == [("kept", "its keys are imported, too")]
    assert said(made)["GPUs"][0][0] == "to do"
    full = imported(tmp_path, text.replace("SHARD_GRAD_OP", "FULL_SHARD"), "config.yaml", force=True)
    assert full.values["strategy"] == "zero2-offload"
    assert "num_processes" in said(full)["--strategy"][-1][1]


def test_the_diffusers_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    made = imported(tmp_path, DIFFUSERS)
    expected = {
        "model": "THUDM/CogVideoX-2b",
        "precision": "fp16",
        "id_token": "BOAT",
        "size": "49x480x720",
        "skip_start": 3,
        "skip_end": 4,
        "steps": 900,
        "rank": 64,
        "alpha": 32,
        "optimizer": "adam",
        "learning_rate": pytest.approx(2e-3),
        "weight_decay": 1e-3,
        "epsilon": 1e-7,
        "lr_cycles": 2,
        "warmup_steps": 200,
        "output": "out",
        "validation_prompts": "BOAT one ship:::BOAT two 'ships'",
        "sample_epochs": 10,
        "sample_guidance": 5,
        "num_processes": 2,
    }
    assert {key: made.values[key] for key in expected} == expected
    remarks = said(made)
    assert ("better", "50 frames become 49: the VAE requires 8N+1 frames") in remarks["--max_num_frames"]
    assert remarks["--random_flip"][0][0] == "none"
    assert remarks["--num_train_epochs"] == [("none", "--max_train_steps takes precedence, as in that program")]
    assert remarks["--report_to"] == [("none", "comet_ml is not supported; use tensorboard, wandb or trackio")]
    assert remarks["--output_dir"][0][0] == "to do"
    assert "secretsecret" not in json.dumps([remark.value for remark in made.remarks])
    assert "secretsecret" not in (tmp_path / "run.yaml").read_text()


def test_the_factorys_script(tmp_path: Path) -> None:
    made = imported(tmp_path, FACTORY)
    assert made.values["model"] == "THUDM/CogVideoX1.5-5B-I2V"
    assert made.values["type"] == "sft"
    assert made.values["buckets"] == ["73x480x720", "73x768x720"]
    assert made.values["output"] == "./run__adamw__1e-4/"
    assert made.values["learning_rate"] == 1e-4
    assert made.values["validation_prompts"] == "A ship's horn, loud:::another"
    assert made.values["validation_images"] == "a.png:::b.png"
    assert (made.values["caption_column"], made.values["video_column"]) == ("text", "path")
    assert "warmup_steps" not in made.values  # constant has none
    remarks = said(made)
    assert "only the first of rate's values 1e-4, 1e-3 is used" in remarks["script"][0][1]
    assert remarks["--dataset_file"][0][0] == "to do"
    assert "rank" not in made.values


def test_finetrainers_script(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    dataset = {"data_root": "clips", "dataset_type": "video", "id_token": "BOAT", "reshape_mode": "bicubic"}
    dataset["video_resolution_buckets"] = [[49, 480, 768]]  # type: ignore[assignment]
    (tmp_path / "lists" / "training.json").write_text(json.dumps({"datasets": [dataset]}))
    rows = [{"caption": "a ship", "num_frames": 49}, {"caption": "a boat", "height": 480}]
    (tmp_path / "lists" / "validation.json").write_text(json.dumps({"data": rows}))
    made = imported(tmp_path, FINETRAINERS)
    expected = {
        "data": "clips",
        "id_token": "BOAT",
        "size": "49x480x768",
        "target_modules": ["to_q", "to_k", "ff.net.2"],
        "steps": 300,
        "warmup_steps": 30,
        "num_processes": 2,
        "validation_prompts": "a ship:::a boat",
        "sample_every": 50,
        "learning_rate": 5e-5,
    }
    assert {key: made.values[key] for key in expected} == expected
    assert "1000 is not less than the run's 300 steps" in said(made)["--lr_warmup_steps"][0][1]
    assert said(made)["--gradient_checkpointing"][0][0] == "better"


@pytest.mark.parametrize("number", range(5))
def test_plan_takes_what_comes_out(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, text = [
        ("train.sh", cogvideo("sft", "true")),
        ("config.yaml", COGKIT),
        ("train.sh", DIFFUSERS),
        ("train.sh", FACTORY),
        ("train.sh", FINETRAINERS.replace("--dataset_config lists/training.json", "--data_root clips")),
    ][number]
    (tmp_path / name).write_text(text)
    told = json.loads(run(capsys, "import", tmp_path / name, "--output", tmp_path / "run.yaml", "--json").out)
    given = {flag["flag"] for flag in told["flags"]}
    assert len(given) > 20
    assert set(told["keys"]) <= set(RunConfig.model_fields)
    plan = json.loads(run(capsys, "plan", "--config", tmp_path / "run.yaml", "--json").out)
    assert plan


def test_no_flag_is_passed_over_in_silence(tmp_path: Path) -> None:
    for text in (cogvideo("lora", "true"), DIFFUSERS, FACTORY):
        made = imported(tmp_path, text, force=True)
        told = {remark.flag.removeprefix("--") for remark in made.remarks}
        assert made.given.flags.keys() - told == set()


def test_each_flag_is_in_one_table_and_each_default_is_known() -> None:
    tables = (KEPT, TOGETHER, BETTER, NOTHING)
    assert sum(map(len, tables)) == len(KNOWN)
    assert set(KEPT.values()) <= set(RunConfig.model_fields)
    assert {name for defaults in DEFAULTS.values() for name in defaults} <= KNOWN


# --------------------------------------------------------------------------------------------------------- refused

REFUSED: dict[str, tuple[str, str]] = {
    "an unknown flag": (
        cogvideo().replace("--seed 7", "--sede 7"),
        "--sede: unknown flag of CogVideo; did you mean 'seed'?",
    ),
    "a variable": (cogvideo().replace('"clips"', '"$CLIPS"'), r"\$CLIPS is set neither in the script"),
    "a command's output": (
        cogvideo().replace("--seed 7", "--seed $(date)"),
        r"--seed .*: \$\(date\) is set neither",
    ),
    "no number": (cogvideo().replace("epochs 10", "epochs many"), "--train_epochs many: expected a number"),
    "a size": (cogvideo().replace("81x768x1360", "81x768"), "'81x768' is not a size"),
    "a side": (cogvideo().replace("81x768x1360", "81x760x1360"), "height 760 must be a multiple of 16"),
    "another model": (FINETRAINERS.replace('"cogvideox"', '"ltx_video"'), "ltx_video: cogtune trains only CogVideoX"),
    "no model": (cogvideo().replace("THUDM/CogVideoX1.5-5B-I2V", "/models/mine"), "neither a local folder nor"),
    "a missing list": (FINETRAINERS, "lists/training.json: no such file"),
    "no training": ("echo train.py\npython prepare.py\n", "does not start a training"),
    "two trainings": (cogvideo() + "\npython train.py --model_path a\n", r"starts 2 trainings, on lines \d+, \d+"),
    "a loop": ("while true; do\npython train.py --model_path a\ndone\n", "line 1: `while` is not supported"),
    "an open quote": ("python train.py --model_path 'a\n", "unclosed quote .'"),
    "another program": ("python train.py --config_name a\n", "not from a supported program"),
    "another optimizer": (
        cogvideo().replace("--seed 7", "--optimizer lion"),
        "--optimizer lion: expected one of adamw",
    ),
    "another schedule": (cogvideo().replace("--seed 7", "--lr_scheduler wave"), "lr_scheduler: .* not 'wave'"),
    "a launcher's flag": (cogvideo(launch="--fp8_backend te"), "--fp8_backend: unknown flag of the launcher"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_and_nothing_written(case: str, tmp_path: Path) -> None:
    text, told = REFUSED[case]
    with pytest.raises(CogtuneError) as caught:
        imported(tmp_path, text)
    assert re.search(told, str(caught.value)), caught.value
    assert not (tmp_path / "run.yaml").exists()


def test_an_unknown_flag_can_be_left_out(tmp_path: Path) -> None:
    text = cogvideo(launch="--fp8_backend te").replace("--seed 7", "--my-flag 1 2")
    made = imported(tmp_path, text, leave_out=["--my-flag", "fp8_backend"])
    assert said(made)["--my_flag"] == [("none", "ignored because of --leave-out")]
    with pytest.raises(UsageError, match="the script has no such flag"):
        imported(tmp_path, cogvideo(), leave_out=["nonsense"], force=True)


def test_what_a_model_cannot_do_is_replaced_and_said(tmp_path: Path) -> None:
    made = imported(tmp_path, cogvideo().replace('"bf16"', '"fp16"'))
    assert made.values["precision"] == "bf16"
    assert "black videos" in said(made)["--mixed_precision"][0][1]
    plain = imported(tmp_path, cogvideo().replace('--mixed_precision "bf16"', ""), force=True)
    assert plain.values["precision"] == "fp32"


def test_what_is_not_installed_is_replaced_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in ("prodigyopt", "wandb") else find(name))
    text = cogvideo().replace('"tensorboard"', '"all"').replace("--seed 7", "--optimizer prodigy --beta3 0.9")
    made = imported(tmp_path, text)
    assert (made.values["optimizer"], made.values["tracker"]) == ("adamw", ["tensorboard"])
    assert "prodigyopt" in said(made)["--optimizer"][0][1]
    assert ("to do", "run `pip install 'cogtune[wandb]'`, then set tracker: [wandb]") in said(made)["--report_to"]


# ----------------------------------------------------------------------------------------------------------- shell


def words(text: str, **environment: str) -> list[tuple[str, ...]]:
    return [command.words for command in follow(text, "x.sh", environment).commands]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a b  c # d", [("a", "b", "c")]),
        ("a b#c", [("a", "b#c")]),
        ("a \\\n  b", [("a", "b")]),
        ('a \'b  $c\' "d\\"e $X"', [("a", "b  $c", 'd"e 1 2')]),
        ("a $X", [("a", "1", "2")]),
        ('a x"$X"y', [("a", "x1 2y")]),
        ("a ${X} ${Y:-z} ${Y-w} ${X:-z}", [("a", "1", "2", "z", "w", "1", "2")]),
        ('A=(1 "2 3" $X)\na "${A[@]}"', [("a", "1", "2 3", "1", "2")]),
        ('A=(1)\nA+=(2)\nB=x\nB+=y\na p"${A[@]}"q $B', [("a", "p1", "2q", "xy")]),
        ("for n in 1 2; do a $n; done", [("a", "1")]),
        ("for n in 1 2\ndo\n for m in x; do a $n$m; done\ndone; b", [("a", "1x"), ("b",)]),
        ('if [ "$X" = "1 2" ]; then a; else b; fi', [("a",)]),
        ('if [[ $Z == q ]]; then a; elif [ -n "$X" ]; then b; else c; fi', [("b",)]),
        ("if [ 1 != 1 ]; then a; fi\nb", [("b",)]),
        ("a > log 2>&1 && b | c &", [("a",), ("b",), ("c",)]),
        ("V=3 a $V", [("a", "3")]),
        ("cmd=\"a 'b c' \\\n d\"\neval $cmd", [("a", "b c", "d")]),
        ("export Q=7 R=8\na $Q$R", [("a", "78")]),
        ("cat <<EOF\na --b\nEOF\nc", [("cat",), ("c",)]),
        ("a ''", [("a", "")]),
        ("(cd x; a) ; { b; }", [("cd", "x"), ("a",), ("b",)]),
    ],
)
def test_words_are_those_that_a_shell_gives(text: str, wanted: list[tuple[str, ...]]) -> None:
    assert words(text, X="1 2", Z="p") == wanted


def test_what_is_not_known_stays_and_is_marked() -> None:
    script: Script = follow("a $NONE ${#B[@]} $(c d) `e`\nsource f.sh\nif grep x y; then b; fi", "x.sh", {})
    assert script.commands[0].words == ("a", "$NONE", "${#B[@]}", "$(c d)", "`e`")
    assert script.unknown == {"$NONE", "${#B[@]}", "$(c d)", "`e`"}
    assert script.commands[-1].words == ("b",)
    assert [remark.split(":")[0] for remark in script.remarks] == ["line 2", "line 3"]


SECRETS = {"HF_TOKEN": "hf_TokenOfAnnaForWriting12", "MY_PASSWORD": "hunter2", "PROXY": "http://anna:hunter2@proxy"}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_of_the_environment_are_not_expanded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script from elsewhere may name any variable where a flag's value is kept, shown, and later published."""
    monkeypatch.setenv(name, SECRETS[name])
    script, output = tmp_path / "train.sh", tmp_path / "run.yaml"
    flags = f'--id_token "${name}" --validation_prompt "a dog, ${{{name}}}" --output_dir $NOWHERE/${name}'
    script.write_text(
        "accelerate launch train_cogvideox_lora.py --pretrained_model_name_or_path THUDM/CogVideoX-2b "
        f"--instance_data_root data --max_train_steps 100 {flags}\n"
    )
    words = ("import", str(script), "--output", str(output))
    status = _status([*words], False)
    printed = capsys.readouterr()
    written = output.read_text() if output.exists() else ""
    assert SECRETS[name] not in written + printed.out + printed.err
    assert f"${name}" in written + printed.out + printed.err
    assert status in (0, 2)


HUGE = {
    "variables that contain each other": "a=xxxxxxxxxx\n" + "a=$a$a\n" * 45,
    "arrays that contain each other": "a=(x x)\n" + 'a=("${a[@]}" "${a[@]}")\n' * 45,
    "eval of itself": 'a=\'eval "$a; $a"\'\neval "$a"\n',
    "arrays in arrays": "a=" + "(a=" * 20_000 + ")" * 20_000 + "\n",
    "loops in loops": "for i in 1; do\n" * 2000 + "done\n" * 2000,
    "branches in branches": "if [ 1 = 1 ]; then\n" * 2000 + "fi\n" * 2000,
    "a long script": "x=1\n" * 250_000,
}


@pytest.mark.parametrize("case", HUGE)
def test_a_script_that_would_take_for_ever_is_refused(case: str, tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(HUGE[case])
    with pytest.raises(CogtuneError, match=r"nested too deeply|more than [\d,]+ char|array inside an array|too large"):
        read(script)


def test_numbers_that_are_none_are_no_numbers(tmp_path: Path) -> None:
    """``str.isdigit`` takes a superscript two for a digit, ``int`` does not; of 5,000 digits, neither is a number."""
    for word in ("\u00b2", "9" * 5000):
        script = tmp_path / "train.sh"
        script.write_text(
            f"accelerate launch --num_processes {word} train_cogvideox_lora.py --max_train_steps 100 "
            "--pretrained_model_name_or_path THUDM/CogVideoX-2b --instance_data_root data\n"
        )
        assert "num_processes" not in translate(read(script)).values
