"""GPUs, machines and the strategy, from launchers' flags and the files that they name."""

from __future__ import annotations

from typing import Any

from cogtune.config.importers.translating import Imported, Remark
from cogtune.config.optimizers import is_compatible
from cogtune.config.resolving import read_mapping
from cogtune.config.strategies import STRATEGIES
from cogtune.system.numbers import whole_number

_OF_COGKIT = {"ddp": "ddp", "shard_grad_op": "zero2", "full_shard": "zero3", "hybrid_shard": "zero3"}
_OF_COGKIT |= {"no_shard": "ddp", "_hybrid_shard_zero2": "zero2"}


def accelerate_config(made: Imported) -> dict[str, Any]:
    """Return the keys of the file that ``accelerate launch --config_file`` names; empty if it is missing."""
    name = (made.given.launch.get("config_file") or [""])[0]
    file = made.given.file(name) if name else None
    return {} if file is None else read_mapping(file)


def strategy(made: Imported) -> None:
    """Set the number of GPUs and the strategy."""
    config = accelerate_config(made)
    _count(made, config)
    named, source = _named(made, config)
    for flag in ("strategy", "offload_params_grads"):
        if made.has(flag):
            made.say(flag, "kept", "in `strategy`")
    count, kind = int(made.values.get("num_processes", 1)), made.values.get("type", "lora")
    note = ""
    if kind == "lora" and named != "ddp":
        named, note = (
            "ddp",
            f"{named} gains little with an adapter; `vram` keeps a run within a GPU's memory",
        )
    elif count < STRATEGIES[named].fewest_processes:  # type: ignore[index]
        other = named.replace("zero3", "zero2")
        named, note = (
            other,
            f"{named} shards weights over GPUs, and there is only one; set num_processes and strategy to use more",
        )
    if source:
        made.values["strategy"], made.sources["strategy"] = named, source
        text = f"strategy: {named}" + (f"; {note}" if note else "")
        made.remarks.append(Remark(source, "", "better" if note else "kept", text))
    chosen = made.values.get("optimizer", "adamw")
    if not is_compatible(chosen, named):  # type: ignore[arg-type]
        made.values["optimizer"] = "adamw"
        made.remarks.append(Remark("--optimizer", chosen, "none", f"not supported by {named}, so optimizer: adamw"))
    if made.has("low_vram"):
        if made.on("low_vram"):
            made.say(
                "low_vram", "better", "a LoRA run takes the GPU memory that is free; base_precision: nf4 quantizes"
            )
        else:
            made.say("low_vram", "better", "off; `vram` keeps a LoRA run within a GPU's memory")


def _count(made: Imported, config: dict[str, Any]) -> None:
    """Set the number of GPUs and of machines."""
    launch, devices = made.given.launch, made.given.devices
    machines = _number((launch.get("nnodes") or launch.get("num_machines") or [str(config.get("num_machines", 1))])[0])
    found: tuple[int | None, str] = (None, "")
    for flag in ("num_processes", "nproc_per_node", "num_gpus"):
        if words := launch.get(flag):
            each = (machines or 1) if flag != "num_processes" else 1
            found = (None if (number := _number(words[0])) is None else number * each, f"--{flag} of the launcher")
    if found[0] is None and "num_processes" in config:
        found = (_number(str(config["num_processes"])), f"num_processes of {launch['config_file'][0]}")
    if found[0] is None and (words := launch.get("gpu_ids")):
        found = (len(words[0].split(",")), "--gpu_ids of the launcher")
    if found[0] is None and devices:
        found = (len(devices.split(",")), "CUDA_VISIBLE_DEVICES of the script")
    if found[0] is None and made.has("dp_degree"):
        found = (_degree(made, "dp_degree") * _degree(made, "dp_shards"), "--dp_degree and --dp_shards")
    number, source = found
    if number is None:
        text = "the script does not set the number of GPUs: num_processes is 1 unless you set it (`--fit` chooses it)"
        made.remarks.append(Remark("GPUs", "", "to do", text))
    else:
        made.values["num_processes"], made.sources["num_processes"] = number, source
        made.remarks.append(Remark(source, "", "kept", f"num_processes: {number}"))
    if machines and machines > 1:
        made.values["num_machines"], made.sources["num_machines"] = machines, "the launcher"
        made.remarks.append(Remark("machines", "", "to do", f"num_machines: {machines}; set main_process_ip"))
    if devices or launch.get("gpu_ids"):
        value = devices or launch["gpu_ids"][0]
        made.remarks.append(Remark("GPUs", value, "to do", "set CUDA_VISIBLE_DEVICES to use only these"))
    for flag in ("pp_degree", "cp_degree", "tp_degree", "parallel_backend", "dp_degree", "dp_shards"):
        if made.has(flag):
            alone = flag.startswith("dp") or flag == "parallel_backend" or _degree(made, flag) == 1
            text = "in num_processes and strategy" if alone else "not supported; `strategy` shards memory"
            made.say(flag, "kept" if alone else "none", text)


def _named(made: Imported, config: dict[str, Any]) -> tuple[str, str]:
    """Return the strategy and the flag that asks for it, which is empty if none does."""
    launch = made.given.launch
    if word := made.word("strategy"):
        name = _OF_COGKIT.get(word.lower())
        if name is None:
            made.problems.append(f"--strategy {word}: expected one of {', '.join(_OF_COGKIT)}")
            name = "ddp"
        return _offloaded(name, made.on("offload_params_grads")), "--strategy"
    if _degree(made, "dp_shards") > 1:
        return "zero3", "--dp_shards"
    if "zero_stage" in launch or "use_deepspeed" in launch:
        return _zero(made, {"zero_stage": (launch.get("zero_stage") or ["2"])[0]}), "--zero_stage of the launcher"
    name = (launch.get("config_file") or [""])[0]
    if not name:
        return "ddp", ""
    if not config:
        guess = _by_name(name)
        text = f"no such file; strategy: {guess}, guessed from its name" if guess else "no such file: set strategy"
        made.remarks.append(Remark("launcher --config_file", name, "to do", text))
        return guess or "ddp", "--config_file of the launcher" if guess else ""
    kind = str(config.get("distributed_type", "NO")).upper()
    source = f"--config_file {name}"
    if kind == "DEEPSPEED":
        return _zero(made, config.get("deepspeed_config") or {}), source
    if kind == "FSDP":
        return "zero3", source
    return "ddp", source


def _zero(made: Imported, config: dict[str, Any]) -> str:
    """Return the strategy that accelerate's DeepSpeed keys ask for, or the DeepSpeed config that they name."""
    if name := config.get("deepspeed_config_file"):
        file = made.given.file(str(name))
        if file is None:
            guess = _by_name(str(name)) or "zero2"
            text = f"no such file; strategy: {guess}, which you should check"
            made.remarks.append(Remark("deepspeed_config_file", str(name), "to do", text))
            return guess
        zero = read_mapping(file).get("zero_optimization") or {}
        offload = zero.get("offload_optimizer") or zero.get("offload_param") or {}
        offloads = isinstance(offload, dict) and offload.get("device") in ("cpu", "nvme")
        return _offloaded("zero3" if zero.get("stage") == 3 else "zero2", offloads)
    stage = _number(str(config.get("zero_stage", 2)))
    offloads = str(config.get("offload_optimizer_device", "none")) in ("cpu", "nvme")
    return "ddp" if stage == 0 else _offloaded("zero3" if stage == 3 else "zero2", offloads)


def _by_name(name: str) -> str | None:
    """Return the strategy that a file's name suggests."""
    lowered = name.lower()
    found = next((zero for zero in ("zero2", "zero3") if zero in lowered), None)
    return found and _offloaded(found, "offload" in lowered)


def _offloaded(name: str, offloads: bool) -> str:
    return f"{name}-offload" if offloads and name != "ddp" else name


def _degree(made: Imported, flag: str) -> int:
    return _number((made.given.flags.get(flag) or ["1"])[0]) or 1


def _number(word: str) -> int | None:
    return whole_number(word)
