"""GPUs and machines."""

from __future__ import annotations

import functools

from pydantic import BaseModel, ValidationInfo, field_validator

from cogtune.config.fields import option
from cogtune.config.strategies import Strategy

_launch = functools.partial(option, panel="Launch")


class MachineFields(BaseModel):
    """GPUs and machines, and how memory and work are shared out over them."""

    strategy: Strategy = _launch("ddp", help_text="How memory and work are shared out over the GPUs.", tags=("resume",))
    pin_memory: bool = _launch(
        True,
        help_text="Under offload, pin the host's buffers: a faster step; off (but for zero3-offload's weights) where "
        "pinned memory is scarce, as in WSL.",
        tags=("machine",),
    )
    num_processes: int = _launch(1, ge=1, help_text="GPUs to train on, of all machines together.")
    num_machines: int = _launch(
        1,
        ge=1,
        help_text="Machines to train on, each with the same command; ZeRO and --resume need an --output that all see.",
        tags=("untimed",),
    )
    machine_rank: int = _launch(
        0, ge=0, help_text="Which of the machines this is; 0 is the main one.", tags=("machine", "network", "untimed")
    )
    main_process_ip: str | None = _launch(
        None, help_text="Address of machine 0, where there are several.", tags=("machine", "network", "untimed")
    )
    main_process_port: int = _launch(
        0,
        ge=0,
        le=65535,
        help_text="Port of machine 0 at which the processes meet; 0, on one machine, for a free one.",
        tags=("machine", "network", "untimed"),
    )
    nccl_timeout: float = _launch(
        30.0,
        gt=0,
        help_text="Minutes after which a machine or process that waits for another gives up.",
        tags=("machine", "untimed"),
    )

    @field_validator("num_machines")
    @classmethod
    def _shared_out(cls, machines: int, info: ValidationInfo) -> int:
        processes = info.data.get("num_processes")
        if processes is not None and processes % machines:
            raise ValueError(f"{processes} processes cannot be shared out evenly over {machines} machines")
        return machines

    @field_validator("machine_rank")
    @classmethod
    def _one_of_them(cls, rank: int, info: ValidationInfo) -> int:
        machines = info.data.get("num_machines")
        if machines is not None and rank >= machines:
            raise ValueError(f"{rank} is not one of {machines} machines, which are counted from 0")
        return rank
