"""`qm-spec train-target`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qm_spec.cli.options import AdamLr, BatchSize, Data, DecayShare, Lr, MaxSteps, Resume, SaveSteps


def train_target(
    data: Data,
    valid: Annotated[list[Path], typer.Option(help="Text never trained on; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model.")],
    max_steps: MaxSteps = 1200,
    batch_size: BatchSize = 16,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    hidden_size: Annotated[int, typer.Option(help="A multiple of 64.")] = 192,
    num_layers: Annotated[int, typer.Option(min=1)] = 20,
    intermediate_size: Annotated[int, typer.Option(min=1)] = 512,
    vocab_size: Annotated[int, typer.Option(min=257)] = 4096,
    context: Annotated[int, typer.Option(help="Declared context length in tokens.")] = 4096,
    lr: Lr = 0.02,
    adam_lr: AdamLr = 3e-3,
    decay_share: DecayShare = 0.5,
    save_steps: SaveSteps = 100,
    seed: int = 0,
    init_from: Annotated[Path | None, typer.Option(help="Go on from this trained target.")] = None,
    resume: Resume = False,
) -> None:
    """Train a small deep Llama on a folder of text.

    Example: `qm-spec train-target --data novels/train --valid novels/valid --out target`
    """
    from qm_spec.training.fit import LoopSettings
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
