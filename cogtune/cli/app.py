"""The command tree."""

from __future__ import annotations

from typing import Annotated

import typer

from cogtune.cli import (
    bench,
    compare,
    dataset,
    demo,
    doctor,
    importing,
    infer,
    lora,
    merge,
    model,
    plan,
    presets,
    push,
    report,
    train,
)
from cogtune.cli.examples import epilog
from cogtune.cli.single_options import Commands

app = Commands(
    name="cogtune",
    help="Fine-tune the CogVideoX video models: from a folder of clips to a LoRA or new weights, and to the Hub.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        from cogtune import __version__
        from cogtune.system import console

        console.say(f"cogtune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[  # noqa: ARG001 (its callback answers)
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,  # noqa: ARG001 (main reads it)
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print results and errors only, without remarks or progress.")
    ] = False,
) -> None:
    """Fine-tune the CogVideoX video models: from a folder of clips to a LoRA or new weights, and to the Hub."""
    from cogtune.system import console

    console.configure(quiet=quiet)


app.add_typer(dataset.app, name="dataset")
app.add_typer(lora.app, name="lora")
app.command("train", epilog=epilog("train"))(train.train)
app.command("report", epilog=epilog("report"))(report.report)
app.command("merge-zero", epilog=epilog("merge-zero"))(merge.merge_zero)
app.command("infer", epilog=epilog("infer"))(infer.infer)
app.command("compare", epilog=epilog("compare"))(compare.compare)
app.command("push", epilog=epilog("push"))(push.push)
app.command("presets", epilog=epilog("presets"))(presets.presets)
app.command("plan", epilog=epilog("plan"))(plan.plan)
app.command("bench", epilog=epilog("bench"))(bench.bench)
app.command("import", epilog=epilog("import"))(importing.import_run)
app.command("doctor", epilog=epilog("doctor"))(doctor.doctor)
app.command("demo", epilog=epilog("demo"))(demo.demo)
app.command("random-model", epilog=epilog("random-model"))(model.random_model)
