"""`qm-spec`: train a drafter for a target, measure it, generate with it. Each command has a file of its own."""

from __future__ import annotations

import typer

from qm_spec.cli import (
    compare,
    compress_train,
    data,
    doctor,
    evaluate,
    fetch,
    generate,
    init,
    inspect,
    install,
    measure_hardware,
    report,
    simulate,
    train,
    train_target,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Train drafters, inspect and install them, measure them, and generate with them.",
    # __main__ turns what the user can mend into a sentence; the rest keeps its plain traceback.
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Train reference targets, QuickMerge drafters and compressors."""


app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("fetch", epilog=fetch.EXAMPLES)(fetch.fetch)
app.command("data", epilog=data.EXAMPLES)(data.answer)
app.command("train")(train.train)
app.command("init")(init.init)
app.command("inspect")(inspect.inspect)
app.command("install")(install.install)
app.command("train-target")(train_target.train_target)
app.command("compress-train")(compress_train.compress_train)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("simulate")(simulate.simulate)
app.command("measure-hardware")(measure_hardware.measure_hardware)
