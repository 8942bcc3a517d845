"""Several processes and several machines: they meet, and one that dies ends the run with its own error."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import Cogtune

from cogtune.errors import UsageError
from cogtune.launch import LaunchFiles
from cogtune.models import VARIANTS, published_spec
from cogtune.plan import accelerate_config, check, check_machines
from cogtune.resolving import resolve
from cogtune.slurm import write_job

TWO = {"num_processes": 16, "num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1"}


def test_each_machine_has_its_own_launch(tmp_path: Path) -> None:
    for preset, kind in (("8xa100-sft-5b-zero2", "DEEPSPEED"), ("4090-lora-5b", "MULTI_GPU")):
        config = resolve(preset_name=preset, flags=TWO).config
        check(config, published_spec(VARIANTS["5b"]))
        file = tmp_path / "accelerate.yaml"
        file.write_text(yaml.safe_dump(accelerate_config(config, tmp_path / "deepspeed.json")))
        read = load_config_from_file(str(file))
        assert (read.num_processes, read.num_machines, read.machine_rank) == (16, 2, 1)
        assert (read.main_process_ip, read.main_process_port) == ("10.0.0.1", 29500)
        assert read.distributed_type == kind
    assert read.deepspeed_config == {}
    command = LaunchFiles(tmp_path).command(config.model_copy(update={"main_process_port": 777}))
    assert command[command.index("--main_process_port") + 1] == "777"
    assert config.local_processes == 8


def test_machines_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(flags={"num_processes": 3, "num_machines": 2, "machine_rank": 2})
    assert "3 processes cannot be shared out evenly over 2 machines" in caught.value.details[0]
    with pytest.raises(UsageError) as caught:
        resolve(flags={"num_processes": 4, "num_machines": 2, "machine_rank": 2})
    assert "2 is not one of 2 machines" in caught.value.details[0]
    config = resolve(flags={"num_processes": 4, "num_machines": 2}).config
    with pytest.raises(UsageError, match="nothing says where"):
        check_machines(config)


def test_a_job_asks_for_what_the_run_needs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder nosuch"):
        write_job(tmp_path / "bad.sh", resolve(flags={"data": "nosuch", "output": tmp_path / "bad"}), overwrite=False)
    assert list(tmp_path.iterdir()) == []
    flags = {**TWO, "data": "someone/clips", "output": tmp_path / "out", "main_process_port": 1234}
    settings = write_job(tmp_path / "job.sh", resolve(preset_name="8xa100-sft-5b-zero2", flags=flags), overwrite=False)
    text = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=8\n" in text
    assert '--machine-rank "$SLURM_NODEID" --main-process-ip "$MAIN" --main-process-port 1234' in text
    assert "dataset cache someone/clips" in text
    assert subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=False).returncode == 0
    assert resolve(file=settings).config.strategy == "zero2"
    assert (tmp_path / "out" / "logs").is_dir()


def test_a_job_that_cannot_run_is_not_written(tmp_path: Path, cogtune: Cogtune) -> None:
    told = cogtune("train", "--preset", "cpu-sft-tiny", "--strategy", "zero3", "--slurm", "job.sh", status=2).err
    assert "strategy zero3 shares weights over GPUs" in told
    told = cogtune("train", "--preset", "8xa100-sft-5b-zero3", "--fit", "--slurm", "job.sh", status=2).err
    assert "--fit chooses for NVIDIA GPUs" in told
    assert not (tmp_path / "job.sh").exists()


FAKE_SRUN = """#!/bin/bash
nodes=2
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#--nodes=}; shift; done
for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i "$@" & pids+=($!); done
status=0; for pid in "${pids[@]}"; do wait "$pid" || status=$?; done; exit $status
"""


@pytest.mark.slow
def test_slurms_script_trains_on_two_machines(clips: Path, tmp_path: Path, cogtune: Cogtune) -> None:
    """Slurm's programs stand-in here; the two machines are this one, and share their output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cogtune(
        "train", "--preset", "cpu-lora-tiny", "--data", clips, "--cache-dir", tmp_path / "cache", "--steps", 2,
        "--eval-every", 0, "--num-processes", 2, "--num-machines", 2, "--main-process-port", port, "--slurm", "job.sh",
    )  # fmt: skip
    for name, text in (("srun", FAKE_SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", tmp_path / "job.sh"],
        env={**os.environ, "PATH": path, "SLURM_JOB_NODELIST": "here"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    ends = [
        json.loads((tmp_path / "out" / name).read_text())["status"]
        for name in ("launch/rank-0.json", "launch-1/rank-1.json")
    ]
    assert ends == ["done", "done"]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = subprocess.Popen(
        [
            sys.executable, "-m", "cogtune", "train", "--preset", "cpu-lora-tiny", "--data", clips, "--output", out,
            "--cache-dir", tmp_path / "cache", "--num-processes", "2", "--steps", "100000", "--eval-every", "0",
            "--checkpoint-every", "100000",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads((out / "launch" / "rank-1.json").read_text())["pid"], signal.SIGKILL)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "process 1 of 2 was killed by signal 9" in told
    assert "Traceback" not in told
