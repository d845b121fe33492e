"""`qm-spec train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qm_spec.cli.options import AdamLr, DecayShare, Lr, Resume, SaveSteps, Target


def train(
    target: Target,
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH",
            help="Answers that `qm-spec data` wrote, conversations (JSON lines with messages), or text; repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new drafter.")],
    drafter: Annotated[str, typer.Option(help="quickmerge; eagle3 or eagle3-window to compare with.")] = "quickmerge",
    epochs: Annotated[float, typer.Option(min=0, help="Times that the data is seen.")] = 2.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps, in place of epochs.")] = None,
    rows_per_step: Annotated[int, typer.Option(min=1, help="Positions of a step that the loss is taken at.")] = 1024,
    rows_per_document: Annotated[
        int | None,
        typer.Option(min=1, help="Of them at most so many in one document, chosen anew each time.", show_default="all"),
    ] = None,
    draft_vocab_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Draft only the N most frequent tokens.", show_default="all tokens"),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=32, help="Tokens per window of text.")] = 1024,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, help="Draft steps unrolled; default K.")] = 4,
    regenerated_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that the target writes behind passages of the text, as data.")
    ] = 0,
    intermediate_size: Annotated[int | None, typer.Option(help="Of the MLP; the target's by default.")] = None,
    aux_layers: Annotated[
        str | None,
        typer.Option(
            metavar="L,L,L",
            help="Layers whose input states are read, 0 = the embedding.",
            show_default="0, 2L/3, L - 1",
        ),
    ] = None,
    lookup_length: Annotated[
        int, typer.Option(help="In vLLM, copy what followed when this many last tokens stood there before; 0 = never.")
    ] = 4,
    window: Annotated[int, typer.Option(help="Tokens kept raw.")] = 512,
    group_size: Annotated[int, typer.Option(help="Tokens merged together.")] = 16,
    schedule: Annotated[str, typer.Option(help="Entries per group at each level; 0 = none.")] = "8,4,2,1",
    saliency: Annotated[str, typer.Option(help="entropy or inverse_entropy.")] = "entropy",
    lr: Lr = 0.02,
    adam_lr: AdamLr = 3e-3,
    decay_share: DecayShare = 0.5,
    save_steps: SaveSteps = 100,
    seed: int = 0,
    data_seed: Annotated[int | None, typer.Option(help="Of the choice of documents.", show_default="seed")] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Go on from this trained drafter. Its draft vocabulary stays, unless --draft-vocab-size is given, too."
        ),
    ] = None,
    states: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what the target computes there: further epochs and drafters do not run it (4.6 KB per token "
            "and 576 units of width).",
        ),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Of the target over several GPUs, e.g. auto; see transformers.")
    ] = None,
    resume: Resume = False,
) -> None:
    """Train a QuickMerge drafter for a target, or EAGLE-3 with as many parameters; the target is frozen.

    Several GPUs: `accelerate launch -m qm_spec train ...` trains on each of them.

    Example: `qm-spec train --target my-model --data answers/ --draft-vocab-size 8192 --out my-model/qm_spec`

    Example: `qm-spec train --target my-model --data texts/ --regenerated-tokens 1000000 --out my-model/qm_spec`
    """
    import logging

    from qm_spec.config import MergeConfig
    from qm_spec.training.drafter import train_drafter
    from qm_spec.training.fit import LoopSettings

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qm_spec").setLevel(logging.INFO)
    stage = train_drafter(
        target,
        data,
        out,
        loop=LoopSettings(
            max_steps or 0,
            rows_per_step,
            lr,
            adam_lr,
            decay_share=decay_share,
            save_steps=save_steps,
            seed=seed,
            epochs=epochs,
        ),
        merge=MergeConfig(window, group_size, tuple(int(n) for n in schedule.split(",")), saliency),
        kind=drafter,
        num_speculative_tokens=num_speculative_tokens,
        intermediate_size=intermediate_size,
        aux_layers=None if aux_layers is None else [int(layer) for layer in aux_layers.split(",")],
        lookup_length=lookup_length,
        draft_vocab_size=draft_vocab_size,
        sequence_length=sequence_length,
        rows_per_document=rows_per_document,
        regenerated_tokens=regenerated_tokens,
        init_from=init_from,
        states_dir=states,
        data_seed=data_seed,
        device_map=device_map,
        resume=resume,
    )
    length = stage["valid_acceptance_length"]
    typer.echo(f"saved {out}: acceptance length {length:.2f} on validation documents")
