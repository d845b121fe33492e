"""`qm-spec train`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qm_spec.cli.options import Window, options_of
from qm_spec.config import SALIENCIES, TRAINED_WINDOW, MergeConfig
from qm_spec.training.settings import DrafterSettings


@options_of(DrafterSettings)
def train(
    aux_layers: Annotated[
        str | None,
        typer.Option(
            metavar="L,L,L",
            help="Layers whose input states are read, 0 = the embedding.",
            show_default="0, 2L/3, L - 1",
        ),
    ] = None,
    window: Window = TRAINED_WINDOW,
    group_size: Annotated[int, typer.Option(help="Tokens merged together.")] = MergeConfig.group_size,
    schedule: Annotated[str, typer.Option(help="Entries per group at each level; 0 = none.")] = "8,4,2,1",
    saliency: Annotated[str, typer.Option(help=f"{' or '.join(SALIENCIES)}.")] = MergeConfig.saliency,
    **options: Any,
) -> None:
    """Train a QuickMerge drafter for a target, or EAGLE-3 with as many parameters; the target is frozen.

    Several GPUs: `accelerate launch -m qm_spec train ...` trains on each of them.

    Example: `qm-spec train --target my-model --data answers/ --draft-vocab-size 8192 --out my-model/qm_spec`

    Example: `qm-spec train --target my-model --data texts/ --regenerated-tokens 1000000 --out my-model/qm_spec`
    """
    import logging

    from qm_spec.training.drafter import train_drafter

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qm_spec").setLevel(logging.INFO)
    settings = DrafterSettings(
        aux_layers=None if aux_layers is None else [int(layer) for layer in aux_layers.split(",")],
        merge=MergeConfig(window, group_size, tuple(int(n) for n in schedule.split(",")), saliency),
        **options,
    )
    length = train_drafter(settings)["valid_acceptance_length"]
    typer.echo(f"saved {settings.out}: acceptance length {length:.2f} on validation documents")
