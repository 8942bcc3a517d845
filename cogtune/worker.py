"""What each process of a run does: read the plan, join data, model and training, say how it ended.

Started by ``accelerate launch --module cogtune.worker PLAN``. A library's noise goes to stderr, which the launcher
keeps in a log; the run's own words go to stdout.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from cogtune import __version__, console
from cogtune.errors import CogtuneError
from cogtune.files import remove_partials, write_atomic
from cogtune.launch import LaunchFiles
from cogtune.models import LORA_WEIGHTS_NAME
from cogtune.plan import Plan, mixed_precision
from cogtune.process import StopRequest, alone_in, work


def run(plan: Plan, stop: StopRequest) -> bool:
    """Train as planned; True when the last step was reached.

    Raises:
        CogtuneError: anything the user can act on.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from diffusers import CogVideoXTransformer3DModel

    from cogtune.checkpoints import check_fits, checkpoints, read_state
    from cogtune.data.cache import Index, Store
    from cogtune.modeling.adapters import add_lora
    from cogtune.modeling.devices import DTYPES
    from cogtune.modeling.encode import VideoEncoder
    from cogtune.training import checkpoint
    from cogtune.training.loop import Training, train
    from cogtune.training.objective import Objective
    from cogtune.training.optimizers import build_optimizer

    config, spec = plan.config, plan.spec
    over_gloo = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=over_gloo and config.strategy == "ddp",
        mixed_precision=None if config.strategy != "ddp" else mixed_precision(config),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if over_gloo else [],
    )
    if accelerator.num_processes != config.num_processes:
        raise CogtuneError(
            f"{accelerator.num_processes} processes were started and the plan is for {config.num_processes}",
            "start it with `cogtune train`, or with the plan's own accelerate.yaml",
        )
    is_lora = config.type == "lora"
    dtype = DTYPES[config.precision]

    weights_dtype = dtype if is_lora else torch.float32  # full training keeps fp32 weights beside its arithmetic
    transformer = CogVideoXTransformer3DModel.from_pretrained(plan.checkpoint / "transformer", dtype=weights_dtype)
    if is_lora:
        add_lora(
            transformer,
            rank=config.rank,
            alpha=config.lora_alpha,
            target_modules=config.target_modules,
            seed=config.seed,
        )
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    optimizer = build_optimizer(transformer.parameters(), config)
    model, prepared = accelerator.prepare(transformer, optimizer)
    trainee = checkpoint.Trainee(accelerator, model, transformer, prepared, is_lora)

    store, index = Store(config.cache_dir or config.data / ".cogtune"), Index.read(plan.index)
    first_step = 0
    if plan.resume is not None:
        state = read_state(plan.resume)
        check_fits(plan.resume, state, plan.identity)
        first_step = int(state["step"])
        checkpoint.load(trainee, plan.resume)
        console.note(f"resumed at step {first_step} from {plan.resume}")

    objective = Objective(
        spec,
        plan.checkpoint,
        store.read("text", index.null_text),
        seed=config.seed,
        caption_dropout=config.caption_dropout,
        device=accelerator.device,
        dtype=dtype,
        image_encoder=VideoEncoder(plan.checkpoint, device=accelerator.device, dtype=dtype)
        if spec.image_to_video
        else None,
    )
    done = train(
        Training(
            trainee=trainee,
            objective=objective,
            store=store,
            index=index,
            config=config,
            first_step=first_step,
            total_steps=plan.total_steps,
            facts=facts_of(plan),
            should_stop=lambda: _any_rank(accelerator, bool(stop)),
        )
    )
    finished = done >= plan.total_steps
    if finished and accelerator.is_main_process:
        publish_weights(config.output, checkpoints(config.output)[-1])
    accelerator.wait_for_everyone()
    return finished


def _any_rank(accelerator: Any, mine: bool) -> bool:
    if accelerator.num_processes == 1:
        return mine
    import torch

    return bool(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum") > 0)


def facts_of(plan: Plan) -> dict[str, Any]:
    """What travels with the weights: enough to sample from them and to write their card."""
    config = plan.config
    return {
        "format": 1,
        "version": __version__,
        "base_model": config.model,
        "model_path": str(plan.checkpoint),
        "variant": plan.spec.variant.name,
        "type": config.type,
        "rank": config.rank,
        "alpha": config.lora_alpha,
        "target_modules": list(config.target_modules),
        "size": str(plan.size),
        "fps": plan.fps,
        "precision": config.precision,
        "id_token": config.id_token,
        "prompt": plan.prompt,
        "dataset": {"samples": plan.samples, "digest": plan.identity["data"]},
        "identity": dict(plan.identity),
    }


def publish_weights(output: Path, newest: Path) -> None:
    """Put the finished run's weights at the top of its folder, where diffusers and ``infer`` look for them."""
    lora = newest / LORA_WEIGHTS_NAME
    if lora.is_file():
        write_atomic(output / LORA_WEIGHTS_NAME, lambda aside: shutil.copyfile(lora, aside))


def main(arguments: list[str] | None = None) -> int:
    """Run one process; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cogtune.worker", description=__doc__)
    parser.add_argument("plan", type=Path, help="plan.json of a run")
    path: Path = parser.parse_args(arguments).plan
    rank = int(os.environ.get("RANK", "0"))
    files = LaunchFiles(path.parent)

    def job(stop: StopRequest) -> bool:
        plan = Plan.read(path)
        if rank != 0:
            return run(plan, stop)
        with alone_in(plan.config.output):
            remove_partials(plan.config.output)  # what a killed run left unfinished
            return run(plan, stop)

    return work(files.report(rank), files.log, job)


if __name__ == "__main__":
    raise SystemExit(main())
