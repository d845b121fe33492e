"""`qm-spec compress-train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qm_spec.cli.options import AdamLr, BatchSize, Data, DecayShare, Lr, MaxSteps, Resume, SaveSteps
from qm_spec.pairs import NOVELS


def compress_train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the new compressor.")],
    target: Annotated[
        Path,
        typer.Option(help="Folder of a transformers causal LM; it is not changed.", show_default="the shipped one"),
    ] = NOVELS / "target",
    layer: Annotated[int, typer.Option(min=0, help="Whose states are compressed; 0 = the embeddings.")] = 5,
    keep: Annotated[int, typer.Option(min=1, help="K, tokens kept of each window or chunk.")] = 32,
    chunk_size: Annotated[int | None, typer.Option(min=1, help="Keep K tokens of every so many.")] = None,
    grouping: Annotated[str, typer.Option(help="cosine or kmeans.")] = "cosine",
    saliency: Annotated[str, typer.Option(help="learned, entropy, inverse_entropy or norm.")] = "learned",
    causal: Annotated[bool, typer.Option(help="No merged token holds a token later than its place.")] = False,
    prior_layers: Annotated[int, typer.Option(min=1, help="Layers of the prior.")] = 2,
    gamma: Annotated[float, typer.Option(min=0, max=1, help="Strictness of the fidelity; 1 counts every error.")] = 0.8,
    alpha: Annotated[float, typer.Option(min=0, help="Weight of the alignment loss.")] = 0.1,
    start_temperature: Annotated[float, typer.Option(help="Of the selection, at the first step.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="After three quarters of the steps, and from then on.")] = 0.1,
    max_steps: MaxSteps = 600,
    batch_size: BatchSize = 8,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    lr: Lr = 0.02,
    adam_lr: AdamLr = 1e-3,
    decay_share: DecayShare = 0.5,
    save_steps: SaveSteps = 100,
    seed: int = 0,
    resume: Resume = False,
) -> None:
    """Train a compressor (saliency and prior) on a frozen target's states of a text; no drafter is involved.

    Example: `qm-spec compress-train --data novels/train --layer 5 --keep 32 --out compressor`
    """
    from qm_spec.quickmerge import TemperatureSchedule
    from qm_spec.training.compressor import train_compressor
    from qm_spec.training.fit import LoopSettings

    stage = train_compressor(
        target,
        data,
        out,
        loop=LoopSettings(
            max_steps, batch_size, lr, adam_lr, decay_share=decay_share, save_steps=save_steps, seed=seed
        ),
        layer=layer,
        keep=keep,
        sequence_length=sequence_length,
        alpha=alpha,
        schedule=TemperatureSchedule(start_temperature, temperature, max(1, 3 * max_steps // 4)),
        resume=resume,
        chunk_size=chunk_size,
        grouping=grouping,
        saliency=saliency,
        causal=causal,
        prior_layers=prior_layers,
        gamma=gamma,
    )
    before, after = (stage[f"valid_{when}"] for when in ("before", "after"))
    changes = ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in after)
    typer.echo(f"saved {out}: on validation text {changes}")
