"""Several processes and several machines: they meet, and one that dies ends the run with its own error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from cogtune.commands.slurm import write_job
from cogtune.config.launchers import accelerate_config, check_machines
from cogtune.config.resolving import resolve
from cogtune.config.run_config import RunConfig
from cogtune.models.checkpoint_configs import published_spec
from cogtune.models.variants import VARIANTS
from cogtune.run.launch import LaunchFiles
from cogtune.run.plan import check_config
from cogtune.system.errors import CogtuneError, UsageError
from cogtune.training import machines
from cogtune.training.machines import require_same_settings, require_shared_output
from tests.conftest import Cogtune
from tests.support.in_process import Ran

TWO = {"num_processes": 16, "num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1"}


def test_each_machine_has_its_own_launch(tmp_path: Path) -> None:
    for preset, kind in (("8xa100-sft-5b-zero2", "DEEPSPEED"), ("4090-lora-5b", "MULTI_GPU")):
        config = resolve(preset_name=preset, flags=TWO).config
        check_config(config, published_spec(VARIANTS["5b"]))
        file = tmp_path / "accelerate.yaml"
        file.write_text(yaml.safe_dump(accelerate_config(config, tmp_path / "deepspeed.json")))
        read = load_config_from_file(str(file))
        assert (read.num_processes, read.num_machines, read.machine_rank) == (16, 2, 1)
        assert (read.main_process_ip, read.main_process_port) == ("10.0.0.1", 29500)
        assert read.distributed_type == kind
    assert read.deepspeed_config == {}
    command = LaunchFiles(tmp_path).command(config.model_copy(update={"main_process_port": 777}))
    assert command[command.index("--main_process_port") + 1] == "777"
    assert command[command.index("--rdzv_conf") + 1] == "timeout=1800"
    assert config.local_processes == 8
    assert "--rdzv_conf" not in LaunchFiles(tmp_path).command(config.model_copy(update={"num_machines": 1}))


class Together:
    """Two threads for the main processes of two machines; what they gather goes from one to the other."""

    def __init__(self) -> None:
        self._rank = threading.local()
        self._barrier = threading.Barrier(2, timeout=600)
        self._given: list[Any] = [None, None]

    def is_machine(self, number: int) -> None:
        """This thread is that machine from now on."""
        self._rank.number = number

    def gather(self, mine: list[Any]) -> list[Any]:
        self._given[self._rank.number] = mine[0]
        self._barrier.wait()
        gathered = list(self._given)
        self._barrier.wait()
        return gathered

    def ends(self, *outputs: Path, strategy: str, resume: Path | None = None) -> list[str]:
        """How each ended: the message of its refusal, or nothing."""

        def one(rank: int) -> str:
            self.is_machine(rank)
            config: dict[str, Any] = {
                "output": outputs[rank],
                "strategy": strategy,
                "num_machines": 2,
                "machine_rank": rank,
            }
            plan: Any = SimpleNamespace(config=RunConfig(num_processes=2, **config), resume=resume)
            accelerator: Any = SimpleNamespace(is_main_process=rank == 0)
            try:
                require_shared_output(accelerator, plan)
            except CogtuneError as error:
                return error.message
            return ""

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))


def test_machines_without_a_common_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Together()
    monkeypatch.setattr(machines, "gather_object", together.gather)
    monkeypatch.setattr(machines, "LOOK_SECONDS", 0.5)
    for name in ("own0", "own1", "shared"):
        (tmp_path / name).mkdir()
    (tmp_path / "mounted").symlink_to("shared")
    (tmp_path / "file").touch()
    own, shared = (tmp_path / "own0", tmp_path / "own1"), (tmp_path / "shared", tmp_path / "mounted")
    refused = "machine 1 does not see the output folder of machine 0, which strategy zero2 requires"
    assert together.ends(*own, strategy="zero2") == [refused] * 2
    assert together.ends(*shared, strategy="zero2") == ["", ""]
    assert together.ends(*own, strategy="ddp") == ["", ""]
    refused = "machine 1 does not see the output folder of machine 0, which resuming requires"
    assert together.ends(*own, strategy="ddp", resume=tmp_path) == [refused] * 2
    assert together.ends(*shared, strategy="ddp", resume=tmp_path) == ["", ""]
    unwritable = together.ends(tmp_path / "file", shared[0], strategy="zero3")  # every process has the main one's error
    assert unwritable[0] == unwritable[1]
    assert unwritable[0].startswith(f"cannot write {tmp_path / 'file'}")
    assert not any(list(folder.iterdir()) for folder in (*own, *shared))  # the mark is gone again


def test_machines_with_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Together()
    monkeypatch.setattr(machines, "gather_object", together.gather)

    def ends(**other: Any) -> list[tuple[str, ...]]:
        def one(rank: int) -> tuple[str, ...]:
            together.is_machine(rank)
            own: dict[str, Any] = {
                "machine_rank": rank,
                "output": tmp_path / str(rank),
                "data": tmp_path / f"data{rank}",
            }
            config = RunConfig(num_machines=2, num_processes=2, **own, **(other if rank else {}))
            plan: Any = SimpleNamespace(
                config=config, resume_fingerprint={"data": "abc", "seed": config.seed}, total_steps=9
            )
            try:
                require_same_settings(plan)
            except CogtuneError as error:
                return error.details
            return ()

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    assert ends() == [(), ()]
    told = ("learning_rate: 0.0001 on machine 0, 0.01 on machine 1", "seed: 42 on machine 0, 5 on machine 1")
    assert ends(seed=5, learning_rate=0.01, tracker=("tensorboard",)) == [told, told]


@pytest.mark.slow
def test_machines_whose_gpus_call_for_other_arrangements_train_together(clips: Path, tmp_path: Path) -> None:
    """What each streams is its own affair: DDP once sent every process what another one's slots held."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["train", "--preset", "cpu-lora-tiny", "--data", clips, "--steps", "2", "--output", tmp_path / "out"]
    words += ["--num-machines", "2", "--num-processes", "2", "--main-process-ip", "127.0.0.1"]
    words += ["--main-process-port", port, "--eval-every", "0"]
    running = []
    for rank in range(2):
        own = ["--machine-rank", rank, "--stream-blocks", rank + 1]
        with (tmp_path / f"log-{rank}").open("w") as log:
            command = [sys.executable, "-m", "cogtune", *map(str, [*words, *own])]
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        ends = [one.wait(600) for one in running]
        assert ends == [0, 0], [(tmp_path / f"log-{rank}").read_text() for rank in range(2)]
    finally:
        for one in running:
            one.kill()
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_a_mark_that_a_network_file_system_shows_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Together()
    shown_from = time.monotonic() + 1
    monkeypatch.setattr(machines, "gather_object", together.gather)
    monkeypatch.setattr(Path, "exists", lambda _self: time.monotonic() > shown_from)
    assert together.ends(tmp_path, tmp_path, strategy="zero2") == ["", ""]


def test_machines_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(flags={"num_processes": 3, "num_machines": 2, "machine_rank": 2})
    assert "3 processes cannot be divided evenly over 2 machines" in caught.value.details[0]
    with pytest.raises(UsageError) as caught:
        resolve(flags={"num_processes": 4, "num_machines": 2, "machine_rank": 2})
    assert "2 is out of range for 2 machines" in caught.value.details[0]
    config = resolve(flags={"num_processes": 4, "num_machines": 2}).config
    with pytest.raises(UsageError, match="--main-process-ip is required"):
        check_machines(config)


def test_a_job_asks_for_what_the_run_needs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder: nosuch"):
        write_job(tmp_path / "bad.sh", resolve(flags={"data": "nosuch", "output": tmp_path / "bad"}))
    assert list(tmp_path.iterdir()) == []
    flags = {**TWO, "data": "someone/clips", "output": tmp_path / "out", "main_process_port": 1234}
    settings = write_job(tmp_path / "job.sh", resolve(preset_name="8xa100-sft-5b-zero2", flags=flags))
    text = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=8\n" in text
    assert '--machine-rank "$SLURM_NODEID" --main-process-ip "$MAIN" --main-process-port 1234' in text
    assert "dataset cache someone/clips" in text
    assert subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=False).returncode == 0
    assert resolve(file=settings).config.strategy == "zero2"
    assert (tmp_path / "out" / "logs").is_dir()


def test_a_job_takes_no_files_place_and_carries_its_flags(clips: Path, tmp_path: Path, command: Cogtune) -> None:
    mine = tmp_path / "job.yaml"
    mine.write_text("steps: 7  # mine")
    run = ("train", "--preset", "cpu-sft-tiny", "--data", clips, "--config", mine, "--slurm")
    for _ in range(2):  # the same again is no change
        command(*run, "job.sh", "--resume", "latest", "--force", "--decoder", "pyav")
    assert mine.read_text() == "steps: 7  # mine"
    flags = "--force --decoder pyav --resume latest"
    assert f"--config {tmp_path / 'job.sh.yaml'} {flags}" in (tmp_path / "job.sh").read_text()
    with (tmp_path / "job.sh").open("a") as script:
        script.write("# --partition\n")
    for place in ("job.sh", "job.yaml", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        assert f"{place} already exists" in command(*run, place, status=2).err
    assert not (tmp_path / "folder.yaml").exists()
    assert "--slurm cannot be used with --smoke" in command(*run, "smoke.sh", "--smoke", status=2).err
    said = command(*run, "a job.sh", "--output", tmp_path / "an output of 5%").out
    assert "sbatch 'a job.sh'" in said
    log = f'#SBATCH --output="{tmp_path}/an output of 5%%/logs/slurm-%j.log"\n'
    assert log in (tmp_path / "a job.sh").read_text()


def test_a_job_that_cannot_run_is_not_written(tmp_path: Path, command: Cogtune) -> None:
    told = command("train", "--preset", "cpu-sft-tiny", "--strategy", "zero3", "--slurm", "job.sh", status=2).err
    assert "strategy zero3 shards weights over GPUs" in told
    told = command("train", "--preset", "8xa100-sft-5b-zero3", "--fit", "--slurm", "job.sh", status=2).err
    assert "--fit requires an NVIDIA GPU" in told
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
    port = free_port()
    cogtune(
        "train", "--preset", "cpu-lora-tiny", "--data", clips, "--steps", 2,
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
            "--num-processes", "2", "--steps", "100000", "--eval-every", "0",
            "--checkpoint-every", "100000",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads((out / "launch" / "rank-1.json").read_text())["pid"], signal.SIGKILL)
    _, told = running.communicate(timeout=600)
    assert running.returncode == 1
    assert "process 1 of 2 was killed by signal 9" in told
    assert "Traceback" not in told


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Machines = Callable[..., list[Ran]]


@pytest.fixture
def two_machines(clips: Path, tmp_path: Path, cogtune: Cogtune) -> Machines:
    """Train on two machines, both of which are this one; ``outputs`` names the folder of each."""

    def run(outputs: tuple[str, str], *words: object, status: int = 0) -> list[Ran]:
        port = free_port()

        def one(rank: int) -> Ran:
            return cogtune(
                "train", "--preset", "cpu-lora-tiny", "--data", clips, "--cache-dir", tmp_path / "cache",
                "--output", outputs[rank], "--eval-every", 0, "--num-processes", 2, "--num-machines", 2,
                "--machine-rank", rank, "--main-process-ip", "127.0.0.1", "--main-process-port", port, *words,
                status=status,
            )  # fmt: skip

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    return run


@pytest.mark.exhaustive
def test_zero_on_several_machines_wants_one_output(tmp_path: Path, two_machines: Machines) -> None:
    zero = ("--strategy", "zero2", "--checkpoint-every", 2)
    for ran in two_machines(("own0", "own1"), *zero, "--steps", 2, status=1):
        assert "waiting for 1 other machine at 127.0.0.1 port" in ran.err
        assert "machine 1 does not see the output folder of machine 0, which strategy zero2 requires" in ran.err
        assert "use the same --output on every machine" in ran.err
    assert not [*tmp_path.glob("own*/*checkpoint*"), *tmp_path.glob("own*/.*.partial")]
    two_machines(("shared", "shared"), *zero, "--steps", 2)
    assert len([*tmp_path.glob("shared/checkpoint-2/pytorch_model/*_optim_states.pt")]) == 2
    two_machines(("shared", "shared"), *zero, "--steps", 4, "--resume", "latest")
    assert (tmp_path / "shared" / "checkpoint-4").is_dir()


@pytest.mark.exhaustive
def test_ddp_on_several_machines_wants_one_output_to_go_on(
    tmp_path: Path, two_machines: Machines, cogtune: Cogtune
) -> None:
    two_machines(("own0", "own1"), "--steps", 2)
    assert (tmp_path / "own0" / "checkpoint-2").is_dir()
    assert sorted(path.name for path in (tmp_path / "own1").iterdir()) == ["launch-1", "logs"]
    told = cogtune(
        "train", "--config", tmp_path / "own1" / "launch-1" / "run.yaml", "--resume", "latest", "--machine-rank", 1,
        status=2,
    )  # fmt: skip
    assert "all of them must see the output folder of machine 0" in told.err
    shutil.copytree(tmp_path / "own0" / "checkpoint-2", tmp_path / "own1" / "checkpoint-2")
    for ran in two_machines(("own0", "own1"), "--steps", 4, "--resume", "latest", status=1):
        assert "machine 1 does not see the output folder of machine 0, which resuming requires" in ran.err


@pytest.mark.exhaustive
def test_a_machine_that_never_comes_is_not_waited_for_for_ever(clips: Path, tmp_path: Path, cogtune: Cogtune) -> None:
    cogtune("dataset", "cache", clips, "--preset", "cpu-lora-tiny", "--cache-dir", tmp_path / "cache")

    def alone(rank: int, port: int, strategy: str = "ddp") -> str:
        return cogtune(
            "train", "--preset", "cpu-lora-tiny", "--data", clips, "--cache-dir", tmp_path / "cache", "--output",
            f"out-{rank}-{port}", "--num-processes", 2, "--num-machines", 2, "--machine-rank", rank, "--strategy",
            strategy, "--main-process-ip", "127.0.0.1", "--main-process-port", port, "--nccl-timeout", 0.05,
            status=1,
        ).err  # fmt: skip

    for strategy in ("ddp", "zero2"):
        port = free_port()
        told = alone(0, port, strategy)
        assert f"waiting for 1 other machine at 127.0.0.1 port {port}, at most 0.05 minutes" in told
        assert f"error: not all of the 2 machines connected to 127.0.0.1 port {port} within 0.05 minutes" in told
        assert "hint: run the same command on each" in told
    port = free_port()
    assert f"error: cannot connect to machine 0 at 127.0.0.1 port {port} within 0.05 minutes" in alone(1, port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert "is already in use on this machine" in alone(0, other.getsockname()[1])
