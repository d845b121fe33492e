"""`qm-spec train-target`."""

from __future__ import annotations

from typing import Any

import typer

from qm_spec.cli.options import options_of
from qm_spec.training.settings import TargetSettings


@options_of(TargetSettings)
def train_target(**options: Any) -> None:
    """Train a small deep Llama on a folder of text.

    Example: `qm-spec train-target --data novels/train --valid novels/valid --out target`
    """
    from qm_spec.training.target import train_target

    settings = TargetSettings(**options)
    nats = train_target(settings)["valid_loss_nats_per_token"]
    typer.echo(f"saved {settings.out}: {nats:.3f} nats per token")
