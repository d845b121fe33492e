"""`qm-spec compress-train`."""

from __future__ import annotations

from typing import Any

import typer

from qm_spec.cli.options import options_of
from qm_spec.training.settings import CompressorSettings


@options_of(CompressorSettings)
def compress_train(**options: Any) -> None:
    """Train a compressor (saliency and prior) on a frozen target's states of a text; no drafter is involved.

    Example: `qm-spec compress-train --data novels/train --layer 5 --keep 32 --out compressor`
    """
    from qm_spec.training.compressor import train_compressor

    settings = CompressorSettings(**options)
    stage = train_compressor(settings)
    before, after = (stage[f"valid_{when}"] for when in ("before", "after"))
    changes = ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in after)
    typer.echo(f"saved {settings.out}: on validation text {changes}")
