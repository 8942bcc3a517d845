"""A run's plan and results as rows of text, and the next command."""

from __future__ import annotations

import shlex

from cogtune.models.variants import LORA_WEIGHTS_NAME
from cogtune.run.checkpoints import checkpoints
from cogtune.run.folder import RunFolder
from cogtune.run.plan import Plan


def _described_sizes(plan: Plan) -> list[tuple[str, str, str]]:
    if not plan.config.buckets:
        source = " and ".join(key for key in ("size", "frames") if getattr(plan.config, key)) or "the model"
        return [("training size", str(plan.size), source)]
    shared = [f"{size} ({plan.buckets.get(size, 0)})" for size in plan.config.buckets]
    return [("training sizes (samples)", ", ".join(shared), "buckets")]


def _described_start(plan: Plan) -> tuple[str, str, str]:
    if plan.resume is not None:
        return ("starts from", str(plan.resume), "--resume")
    if plan.config.init_lora is not None:
        return ("starts from", str(plan.config.init_lora), "init_lora")
    return ("starts from", "the base model", "model")


def describe(plan: Plan) -> list[tuple[str, str, str]]:
    """Describe a plan as rows of key, value and the value's source."""
    derived = [
        ("base model", str(plan.base_model_dir), "model"),
        *_described_sizes(plan),
        ("tokens per sample", f"{plan.tokens:,}", "the largest size" if plan.config.buckets else "size"),
        ("frames per second", f"{plan.fps:g}", "fps" if plan.config.fps else "the model"),
        ("samples", str(plan.samples), "data"),
        ("samples per step", str(plan.config.global_batch), "batch size x accumulation x processes"),
        ("optimizer steps", str(plan.total_steps), "epochs" if plan.config.epochs else "steps"),
        _described_start(plan),
    ]
    values = plan.config.to_dict()
    return [(key, str(value), plan.provenance[key]) for key, value in values.items()] + derived


def results(plan: Plan) -> list[str]:
    """List what a finished run wrote, and the next command."""
    output = plan.config.output
    newest = checkpoints(output)[-1]
    where = shlex.quote(str(output))
    page = [str(RunFolder(output).page)] if (RunFolder(output).page).is_file() else []
    if plan.config.type == "lora":
        image = " --image FIRST_FRAME.png" if plan.spec.image_to_video else ""
        return [f"{output / LORA_WEIGHTS_NAME}", *page, f"next: cogtune infer --lora {where}{image}"]
    if not plan.config.sharding.uses_deepspeed:
        return [f"{newest / 'transformer'}", *page, f"next: cogtune infer --model {where}"]
    return [f"{newest}", *page, f"next: cogtune merge-zero {shlex.quote(str(newest))}"]
