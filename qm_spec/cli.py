"""`qm-spec`: train a reference target, train a drafter for a target, show what is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__)


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

    loop = LoopSettings(max_steps, batch_size, lr, adam_lr, save_steps=save_steps, seed=seed)
    record = train_target(
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
    typer.echo(f"saved {out}: {record['stages'][-1]['valid_loss_nats_per_token']:.3f} nats per token")


if __name__ == "__main__":
    app()
