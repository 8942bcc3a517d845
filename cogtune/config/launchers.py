"""The config files of Accelerate and DeepSpeed, made from the run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cogtune.config.run_config import RunConfig
from cogtune.system.errors import CogtuneError, UsageError

_PORT = 29500
"""Torch's default."""

REDUCE_BUCKET = {2: 100_000_000, 3: 500_000_000}
"""DeepSpeed's gradient bucket size in elements, by ZeRO stage.

A bucket takes its memory several times: one fills while a copy of another is reduced.
"""

ZERO2_SHARDS = "groups of powers of two"
"""How ZeRO-2's shards are grouped, recorded in checkpoints. Change it whenever the parameter groups change."""


def accelerate_config(config: RunConfig, deepspeed_file: Path) -> dict[str, Any]:
    """Return Accelerate's config. With DeepSpeed, the precision is in DeepSpeed's own file only."""
    shared: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "machine_rank": config.machine_rank,
        "main_training_function": "main",
        "num_machines": config.num_machines,
        "num_processes": config.num_processes,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    if config.num_machines > 1:
        shared |= {"main_process_ip": config.main_process_ip, "main_process_port": rendezvous_port(config)}
    if config.sharding.uses_deepspeed:
        # "standard": every machine starts its own processes, as with DDP, rather than one through ssh
        deepspeed = {
            "deepspeed_config_file": str(deepspeed_file),
            "deepspeed_multinode_launcher": "standard",
            "zero3_init_flag": False,
        }
        return shared | {"distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}
    kind = "MULTI_GPU" if config.num_processes > 1 else "NO"
    return shared | {"distributed_type": kind, "mixed_precision": mixed_precision(config)}


def check_machines(config: RunConfig) -> None:
    """Check that several machines can connect.

    Raises:
        UsageError: no address is given.
    """
    if config.num_machines > 1 and config.main_process_ip is None:
        raise UsageError(
            f"--main-process-ip is required with --num-machines {config.num_machines}",
            "pass machine 0's address as --main-process-ip",
        )


def rendezvous_port(config: RunConfig) -> int:
    """Return the port of machine 0 on which the processes connect; 0 for any free one (single machine only)."""
    return config.main_process_port or (_PORT if config.num_machines > 1 else 0)


def rendezvous(config: RunConfig) -> str:
    """Describe the address and port at which the processes of several machines connect."""
    return f"{config.main_process_ip} port {rendezvous_port(config)}"


def rendezvous_timeout(config: RunConfig) -> CogtuneError:
    """Return the error for machines that did not connect in time."""
    waited = f"within {config.nccl_timeout:g} minutes (--nccl-timeout)"
    if config.machine_rank == 0:
        return CogtuneError(
            f"not all of the {config.num_machines} machines connected to {rendezvous(config)} {waited}",
            "run the same command on each, with its own --machine-rank, and check the output of those that are running",
        )
    return CogtuneError(
        f"cannot connect to machine 0 at {rendezvous(config)} {waited}",
        "run the same command there with --machine-rank 0, and check that this address and port are reachable from "
        "here",
    )


def mixed_precision(config: RunConfig) -> str:
    """Return Accelerate's name for the run's precision."""
    return "no" if config.precision == "fp32" else config.precision


def largest_group(trained: int, processes: int) -> int:
    """Return the maximum size of a ZeRO-2 parameter group, in numbers, unless a single parameter is larger.

    A process's part of them is a power of two, which torch rounds a pinned buffer up to, and there are at least four.
    """
    part = max(1, trained // (4 * processes))
    return processes << (part.bit_length() - 1)


def deepspeed_config(config: RunConfig) -> dict[str, Any] | None:
    """Return DeepSpeed's config, or None for DDP."""
    if not config.sharding.uses_deepspeed:
        return None
    stage = config.sharding.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        # Under ZeRO-2 "contiguous" makes room for all of a process's gradients while the activations are still there.
        # (Under offload DeepSpeed does so whatever stands here, but keeps no gradients on the GPU.)
        "contiguous_gradients": stage == 3,
        "reduce_bucket_size": REDUCE_BUCKET[stage],
    }
    if config.sharding.offloads:
        on_the_host = {"device": "cpu", "pin_memory": config.pin_memory}
        zero |= dict.fromkeys(
            ("offload_optimizer", "offload_param") if stage == 3 else ("offload_optimizer",), on_the_host
        )
    return {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_batch_size": config.global_batch,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
