"""Options and exit codes that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qm_spec.bench.settings import RaySettings

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

# What every command takes that can share its work among Ray actors.
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Of a running cluster, or auto.", show_default="one on this machine"),
]
NumCpus = Annotated[float, typer.Option(help="Cores per actor.")]
NumGpus = Annotated[
    float | None, typer.Option(help="GPUs per actor.", show_default="1 where this machine has one, else 0")
]


def ray_settings(num_actors: int, address: str | None, num_cpus: float, num_gpus: float | None) -> RaySettings | None:
    """Return what the options of a command ask of Ray, None for nothing.

    Raises:
        ValueError: Ray is not installed, an address comes without actors, or a value is out of range.
    """
    from importlib.util import find_spec

    from qm_spec.bench.environment import default_device
    from qm_spec.bench.settings import RaySettings

    if num_actors == 0:
        if address is not None:
            raise ValueError(f"ray: the address {address} must come with --ray N, the number of actors")
        return None
    if find_spec("ray") is None:
        raise ValueError("ray: is not installed; install it with pip install 'qm_spec[eval]', or leave --ray out")
    if num_gpus is None:
        num_gpus = 1.0 if default_device() == "cuda" else 0.0
    return RaySettings(num_actors, address, num_cpus, num_gpus)
