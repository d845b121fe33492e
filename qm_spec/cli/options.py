"""Options and exit codes that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_ENGINE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# What every command of training takes.
Data = Annotated[list[Path], typer.Option(help="Text file or folder; may be repeated.")]
Target = Annotated[Path, typer.Option(help="Folder of a transformers causal LM; it is not changed.")]
MaxSteps = Annotated[int, typer.Option(min=1)]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows per step.")]
Lr = Annotated[float, typer.Option(help="Muon step of the matrices.")]
AdamLr = Annotated[float, typer.Option(help="AdamW step of everything else.")]
DecayShare = Annotated[float, typer.Option(min=0, max=1, help="Last part of the steps, where lr falls to 0.")]
SaveSteps = Annotated[int, typer.Option(min=1)]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.")]
