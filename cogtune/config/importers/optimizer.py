"""The optimizer and its learning rate schedule."""

from __future__ import annotations

import importlib.util

from cogtune.config.importers.translating import Imported
from cogtune.config.optimizers import OPTIMIZERS


def optimizer(made: Imported) -> None:
    """Set the optimizer, if it is installed."""
    name = (made.word("optimizer") or "adamw").lower()
    small = next((flag for flag in ("use_8bit", "use_8bit_adam", "use_8bit_bnb", "use_4bit") if made.on(flag)), None)
    wanted = {"adam": "adam", "adamw": "adamw", "prodigy": "prodigy", "came": "came"}.get(name)
    wanted = {"adamw-bnb-8bit": "adamw-8bit", "adamw_bnb_8bit": "adamw-8bit", "adam-bnb-8bit": "adamw-8bit"}.get(
        name, wanted
    )
    if wanted is None:
        made.problems.append(f"--optimizer {name}: expected one of {', '.join(OPTIMIZERS)}")
        wanted = "adamw"
    if small and wanted in ("adam", "adamw"):
        wanted = "adamw-8bit"
        made.say(small, "kept", "optimizer: adamw-8bit" + (", not 4 bits" if small == "use_4bit" else ""))
    elif made.on("use_cpu_offload_optimizer") and wanted in ("adam", "adamw"):
        wanted = "adamw-offload"
        made.say("use_cpu_offload_optimizer", "kept", "optimizer: adamw-offload")
    needs = OPTIMIZERS[wanted]  # type: ignore[index]
    note = ""
    if needs.module and importlib.util.find_spec(needs.module) is None:
        note = f"{wanted} requires {needs.package}, which is not installed: run `pip install 'cogtune[optimizers]'`"
        wanted = "adamw"
    if made.word("optimizer") or wanted != "adamw":
        made.set("optimizer", wanted, "optimizer" if made.word("optimizer") or small is None else small, note)
    for flag in ("beta3", "prodigy_beta3"):
        if made.has(flag) and wanted in ("prodigy", "came"):
            made.set("beta3", made.number(flag), flag)
        elif made.has(flag):
            made.say(flag, "none", f"{wanted} has no beta3")
    switches = {
        "prodigy_decouple": "prodigy_decouple",
        "prodigy_use_bias_correction": "prodigy_bias_correction",
        "prodigy_safeguard_warmup": "prodigy_safeguard_warmup",
    }
    for flag, key in switches.items():
        if wanted == "prodigy":
            made.set(key, made.on(flag), flag)
        elif made.has(flag):
            made.say(flag, "none", "only for prodigy")
    rest = ("use_8bit", "use_8bit_adam", "use_8bit_bnb", "use_4bit", "use_torchao", "use_cpu_offload_optimizer")
    for flag in rest:
        if made.has(flag) and flag not in made.told:
            made.say(flag, "none", "off, or not supported by the optimizer")


def schedule(made: Imported) -> None:
    """Set the learning rate schedule."""
    name = made.word("lr_scheduler") or "constant_with_warmup"
    if made.word("lr_scheduler"):
        made.set("lr_scheduler", name, "lr_scheduler")
    warmup = made.number("lr_warmup_steps")
    if warmup is not None:
        steps = made.values.get("steps")
        if name in ("constant", "piecewise_constant"):
            made.say("lr_warmup_steps", "none", f"{name} has no warmup, as in that program")
        elif isinstance(steps, int) and warmup >= steps:
            lower = max(0, steps // 10)
            made.set("warmup_steps", lower, "lr_warmup_steps", f"{warmup:g} is not less than the run's {steps} steps")
        else:
            made.set("warmup_steps", warmup, "lr_warmup_steps")
    if made.has("scale_lr"):
        if not made.on("scale_lr"):
            made.say("scale_lr", "none", "off")
            return
        keys = ("gradient_accumulation_steps", "batch_size", "num_processes")
        factor = 1
        for key in keys:
            factor *= int(made.values.get(key, 1))
        made.set("learning_rate", float(made.values.get("learning_rate", 1e-4)) * factor, "scale_lr",
                 f"multiplied by {factor} for batch size, accumulation and GPUs")  # fmt: skip
