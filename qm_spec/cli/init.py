"""`qm-spec init`."""

from __future__ import annotations

from typing import Any

import typer

from qm_spec.cli.options import Window, options_of
from qm_spec.config import TRAINED_WINDOW, MergeConfig
from qm_spec.training.settings import NewDrafterSettings


@options_of(NewDrafterSettings)
def init(window: Window = TRAINED_WINDOW, **options: Any) -> None:
    """Write an untrained drafter for a target, for conformance tests and to measure costs: it drafts nothing useful.

    Its weights are random. Of the target only config and tokenizer are read.

    Example: `qm-spec init --target my-model --draft-vocab-size 8192 --out untrained`
    """
    from qm_spec.training.untrained import write_untrained

    settings = NewDrafterSettings(merge=MergeConfig(window), **options)
    stage = write_untrained(settings)
    typer.echo(
        f"saved {settings.out}: an UNTRAINED drafter of {stage['parameters']:,} random parameters, for tests and "
        "costs only; qm-spec train makes one that drafts"
    )
