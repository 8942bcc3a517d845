"""The config files of Accelerate and DeepSpeed: every figure in them comes from the run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cogtune.config.run_config import RunConfig
from cogtune.system.errors import CogtuneError, UsageError

_PORT = 29500
"""Torch's own choice."""

REDUCE_BUCKET = {2: 100_000_000, 3: 500_000_000}
"""Gradients that DeepSpeed reduces together, in elements, by ZeRO stage.

Their memory counts several times: one bucket fills while another is reduced, and what is reduced is a copy.
"""

ZERO2_LAYOUT = "groups of powers of two"
"""Names how ZeRO-2's shards are laid out, for checkpoints: another name for every change of what a group is."""


def accelerate_config(config: RunConfig, deepspeed_file: Path) -> dict[str, Any]:
    """Return the file ``accelerate launch`` reads. With DeepSpeed, precision stands in DeepSpeed's own file alone."""
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
        shared |= {"main_process_ip": config.main_process_ip, "main_process_port": meeting_port(config)}
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
    """See that several machines can meet.

    Raises:
        UsageError: nothing says where.
    """
    if config.num_machines > 1 and config.main_process_ip is None:
        raise UsageError(
            f"{config.num_machines} machines have to meet, and nothing says where",
            "give machine 0's address as --main-process-ip",
        )


def meeting_port(config: RunConfig) -> int:
    """The port of machine 0 at which the processes meet; 0 for a free one, which several machines cannot agree on."""
    return config.main_process_port or (_PORT if config.num_machines > 1 else 0)


def meeting_point(config: RunConfig) -> str:
    """Return where the processes of several machines meet, in words."""
    return f"{config.main_process_ip} port {meeting_port(config)}"


def machines_missing(config: RunConfig) -> CogtuneError:
    """Return what is told when the machines of a run did not meet in time."""
    waited = f"within {config.nccl_timeout:g} minutes (--nccl-timeout)"
    if config.machine_rank == 0:
        return CogtuneError(
            f"not all of the {config.num_machines} machines came to {meeting_point(config)} {waited}",
            "start the same command on each, with its own --machine-rank, and see what those say that were started",
        )
    return CogtuneError(
        f"machine 0 could not be met at {meeting_point(config)} {waited}",
        "start the same command there, with --machine-rank 0; it must be reachable from here at that address and port",
    )


def mixed_precision(config: RunConfig) -> str:
    """Return Accelerate's word for the run's precision."""
    return "no" if config.precision == "fp32" else config.precision


def largest_group(trained: int, processes: int) -> int:
    """Return how many of ``trained`` numbers ZeRO-2 handles as one at most, unless a single parameter is more.

    A process's part of them is a power of two, which torch rounds a pinned buffer up to, and there are at least four.
    """
    part = max(1, trained // (4 * processes))
    return processes << (part.bit_length() - 1)


def deepspeed_config(config: RunConfig) -> dict[str, Any] | None:
    """Return DeepSpeed's file, or None for DDP. Every figure in it comes from the run's configuration."""
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
