"""`qm-spec`: train a drafter for a target, or a small target to try things on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help=__doc__,
    # __main__ turns what the user can mend into a sentence; the rest keeps its plain traceback.
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Train reference targets and QuickMerge drafters."""


@app.command("train-target")
def train_target_command(
    data: Annotated[list[Path], typer.Option(help="Text file or folder; may be repeated.")],
    valid: Annotated[list[Path], typer.Option(help="Text never trained on; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model.")],
    max_steps: Annotated[int, typer.Option(min=1)] = 1200,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    hidden_size: Annotated[int, typer.Option(help="A multiple of 64.")] = 192,
    num_layers: Annotated[int, typer.Option(min=1)] = 20,
    intermediate_size: Annotated[int, typer.Option(min=1)] = 512,
    vocab_size: Annotated[int, typer.Option(min=257)] = 4096,
    context: Annotated[int, typer.Option(help="Declared context length in tokens.")] = 4096,
    lr: Annotated[float, typer.Option(help="Muon step of the matrices.")] = 0.02,
    adam_lr: Annotated[float, typer.Option(help="AdamW step of everything else.")] = 3e-3,
    decay_share: Annotated[
        float, typer.Option(min=0, max=1, help="Last part of the steps, where lr falls to 0.")
    ] = 0.5,
    save_steps: Annotated[int, typer.Option(min=1)] = 100,
    seed: int = 0,
    init_from: Annotated[Path | None, typer.Option(help="Go on from this trained target.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.")] = False,
) -> None:
    """Train a small deep Llama on a folder of text.

    Example: `qm-spec train-target --data novels/train --valid novels/valid --out target`
    """
    from qm_spec.training.loop import LoopSettings
    from qm_spec.training.target import train_target

    loop = LoopSettings(max_steps, batch_size, lr, adam_lr, decay_share=decay_share, save_steps=save_steps, seed=seed)
    stage = train_target(
        data,
        valid,
        out,
        loop=loop,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=intermediate_size,
        context=context,
        sequence_length=sequence_length,
        init_from=init_from,
        resume=resume,
    )
    typer.echo(f"saved {out}: {stage['valid_loss_nats_per_token']:.3f} nats per token")


@app.command("train")
def train_command(
    target: Annotated[Path, typer.Option(help="Folder of a transformers causal LM; it is not changed.")],
    data: Annotated[list[Path], typer.Option(help="Text file or folder; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder of the new drafter.")],
    max_steps: Annotated[int, typer.Option(min=1)] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=32, help="Tokens per window.")] = 1024,
    rows_per_window: Annotated[int, typer.Option(min=1, help="Positions per window the loss is taken at.")] = 128,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, help="Draft steps unrolled; default K.")] = 4,
    regenerated_tokens: Annotated[int, typer.Option(min=0, help="Tokens the target writes as data.")] = 0,
    intermediate_size: Annotated[int | None, typer.Option(help="Of the MLP; the target's by default.")] = None,
    window: Annotated[int, typer.Option(help="Tokens kept raw.")] = 128,
    group_size: Annotated[int, typer.Option(help="Tokens merged together.")] = 16,
    schedule: Annotated[str, typer.Option(help="Entries per group at each level; 0 = none.")] = "8,4,2,1",
    saliency: Annotated[str, typer.Option(help="entropy or inverse_entropy.")] = "entropy",
    lr: Annotated[float, typer.Option(help="Muon step of the matrices.")] = 0.02,
    adam_lr: Annotated[float, typer.Option(help="AdamW step of everything else.")] = 3e-3,
    decay_share: Annotated[
        float, typer.Option(min=0, max=1, help="Last part of the steps, where lr falls to 0.")
    ] = 0.5,
    save_steps: Annotated[int, typer.Option(min=1)] = 100,
    seed: int = 0,
    init_from: Annotated[Path | None, typer.Option(help="Go on from this trained drafter.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.")] = False,
) -> None:
    """Train a QuickMerge drafter for a target; the target is frozen.

    Example: `qm-spec train --target my-model --data texts/ --regenerated-tokens 1000000 --out my-model/qm_spec`
    """
    from qm_spec.config import MergeConfig
    from qm_spec.training.drafter import train_drafter
    from qm_spec.training.loop import LoopSettings

    stage = train_drafter(
        target,
        data,
        out,
        loop=LoopSettings(
            max_steps, batch_size, lr, adam_lr, decay_share=decay_share, save_steps=save_steps, seed=seed
        ),
        merge=MergeConfig(window, group_size, tuple(int(n) for n in schedule.split(",")), saliency),
        num_speculative_tokens=num_speculative_tokens,
        intermediate_size=intermediate_size,
        sequence_length=sequence_length,
        rows_per_window=rows_per_window,
        regenerated_tokens=regenerated_tokens,
        init_from=init_from,
        resume=resume,
    )
    length = stage["valid_acceptance_length_teacher_forced"]
    typer.echo(f"saved {out}: acceptance length {length:.2f} on validation text")


if __name__ == "__main__":
    app()
