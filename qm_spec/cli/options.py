"""Options and exit codes that several commands share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

if TYPE_CHECKING:
    from qm_spec.bench.settings import RaySettings

EXIT_ENGINE_FAILED = 1
EXIT_FOUND_PROBLEM = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

Command = Callable[..., None]


def options_of(settings: type) -> Callable[[Command], Command]:
    """Give a command an option for each field of a dataclass that is annotated with one.

    Their values arrive as its `**options`. A parameter of the command's own that is named like a field takes its place,
    for what is typed in another form than the field holds. Options that must be given come first.
    """
    hints = get_type_hints(settings, include_extras=True)
    fields = {
        field.name: Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(settings)
    }

    def with_options(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        own = {
            name: parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name])
            for name, parameter in signature(command).parameters.items()
            if parameter.kind is not Parameter.VAR_KEYWORD
        }
        parameters = [
            own.get(name) or fields[name]
            for name in dict.fromkeys([*settings.__annotations__, *fields, *own])
            if name in own or get_origin(fields[name].annotation) is Annotated
        ]
        parameters.sort(key=lambda parameter: parameter.default is not Parameter.empty)

        @functools.wraps(command)
        def given(**values: Any) -> None:
            command(**values)

        given.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        given.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return given

    return with_options


TargetName = typer.Option("--target", metavar="TARGET", help="Folder of a target model, or its hub id.")
# Of a drafter that is made.
Window = Annotated[int, typer.Option(help="Tokens kept raw.")]

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
