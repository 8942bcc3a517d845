"""GPUs and machines."""

from __future__ import annotations

import functools

from pydantic import BaseModel, ValidationInfo, field_validator

from cogtune.config.fields import option
from cogtune.config.strategies import Strategy

_launch = functools.partial(option, panel="Launch")


class MachineFields(BaseModel):
    """GPUs and machines, and how memory and work are distributed over them."""

    strategy: Strategy = _launch(
        "ddp", help_text="How memory and work are distributed over the GPUs.", tags=("resume",)
    )
    pin_memory: bool = _launch(
        True,
        help_text="With offload, pin host buffers for faster steps. Turn it off if pinned memory is scarce, as in WSL "
        "(zero3-offload still pins its weights).",
        tags=("machine",),
    )
    num_processes: int = _launch(1, ge=1, help_text="Number of GPUs to train on, over all machines.")
    num_machines: int = _launch(
        1,
        ge=1,
        help_text="Number of machines; run the same command on each. ZeRO and --resume require an --output they all "
        "share.",
        tags=("untimed",),
    )
    machine_rank: int = _launch(
        0, ge=0, help_text="Index of this machine; 0 is the main one.", tags=("machine", "network", "untimed")
    )
    main_process_ip: str | None = _launch(
        None, help_text="Address of machine 0, if there are several.", tags=("machine", "network", "untimed")
    )
    main_process_port: int = _launch(
        0,
        ge=0,
        le=65535,
        help_text="Port of machine 0 on which the processes connect; 0 picks a free one (single machine only).",
        tags=("machine", "network", "untimed"),
    )
    nccl_timeout: float = _launch(
        30.0,
        gt=0,
        help_text="Minutes that a machine or process waits for another before it gives up.",
        tags=("machine", "untimed"),
    )

    @field_validator("num_machines")
    @classmethod
    def _shared_out(cls, machines: int, info: ValidationInfo) -> int:
        processes = info.data.get("num_processes")
        if processes is not None and processes % machines:
            raise ValueError(f"{processes} processes cannot be divided evenly over {machines} machines")
        return machines

    @field_validator("machine_rank")
    @classmethod
    def _one_of_them(cls, rank: int, info: ValidationInfo) -> int:
        machines = info.data.get("num_machines")
        if machines is not None and rank >= machines:
            raise ValueError(f"{rank} is out of range for {machines} machines, which are numbered from 0")
        return rank
