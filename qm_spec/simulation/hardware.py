"""What a machine can do, as a small JSON file: rates, memory, links and the time that the host adds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qm_spec.discovery.files import read_json

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8": 1}
_SHIPPED = Path(__file__).parent / "machines"
_SHARES = ("memory_share", "compute_share")
_RATES = ("memory_bytes_per_s", "memory_bytes")


@dataclass(frozen=True)
class Hardware:
    """One device, and the host in front of it.

    Args:
        name: of the device.
        source: where the numbers come from.
        flops_per_s: peak operations per second by dtype, dense, a multiply-add counted as two.
        memory_bytes_per_s: peak bytes per second of its memory.
        memory_bytes: size of its memory.
        interconnect_bytes_per_s: one direction, to the other devices of a tensor-parallel group; None for one
            device alone.
        interconnect_latency_s: of one exchange.
        memory_share: share of the peak bytes per second that kernels reach.
        compute_share: share of the peak operations per second that kernels reach.
        step_overhead_s: host time of every engine step: scheduling, inputs, sampling, outputs.
        layer_overhead_s: time that each layer adds, however little it computes; near 0 where graphs are captured.
        speculation_overhead_s: host time that a step which drafts takes in addition.
        draft_overhead_s: time that each draft pass takes in addition to its roofline.

    Raises:
        ValueError: a number is out of range, or a dtype is unknown.
    """

    name: str
    source: str
    flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    memory_bytes: float
    interconnect_bytes_per_s: float | None = None
    interconnect_latency_s: float = 0.0
    memory_share: float = 1.0
    compute_share: float = 1.0
    step_overhead_s: float = 0.0
    layer_overhead_s: float = 0.0
    speculation_overhead_s: float = 0.0
    draft_overhead_s: float = 0.0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.flops_per_s) - set(DTYPE_BYTES))
        if unknown or not self.flops_per_s:
            raise ValueError(
                f"hardware: flops_per_s must name dtypes out of {sorted(DTYPE_BYTES)}, got {unknown or 'none at all'}"
            )
        positive = {f"flops_per_s of {dtype}": rate for dtype, rate in self.flops_per_s.items()}
        positive.update({name: getattr(self, name) for name in _RATES})
        if self.interconnect_bytes_per_s is not None:
            positive["interconnect_bytes_per_s"] = self.interconnect_bytes_per_s
        for name, value in positive.items():
            if not _is_number(value) or not 0 < value < float("inf"):
                raise ValueError(f"hardware: {name} must be a number above 0, got {value!r}")
        for name in _SHARES:
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) <= 1:
                raise ValueError(f"hardware: {name} must be above 0 and at most 1, got {getattr(self, name)!r}")
        for name in (field.name for field in dataclasses.fields(self)):
            if name.endswith(("overhead_s", "latency_s")):
                value = getattr(self, name)
                if not _is_number(value) or not 0 <= value < float("inf"):
                    raise ValueError(f"hardware: {name} must be seconds from 0, got {value!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Hardware:
        """Build from the JSON of a hardware file.

        Raises:
            ValueError: a key is unknown or missing, or a value is out of range.
        """
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        unknown, missing = sorted(set(values) - known), sorted(required - set(values))
        if unknown or missing:
            raise ValueError(
                f"hardware: unknown settings {unknown}, missing ones {missing}; known are {sorted(known)}, "
                f"of which {sorted(required)} must be given"
            )
        if not isinstance(values["flops_per_s"], Mapping):
            raise ValueError(f"hardware: flops_per_s must map dtypes to rates, got {values['flops_per_s']!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in a hardware file."""
        return {**dataclasses.asdict(self), "flops_per_s": dict(self.flops_per_s)}

    def write(self, file: Path) -> None:
        """Write a hardware file."""
        file.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def attainable_flops_per_s(self, dtype: str) -> float:
        """Return the operations per second that kernels reach.

        Raises:
            ValueError: the device has no rate of this dtype.
        """
        if dtype not in self.flops_per_s:
            raise ValueError(
                f"hardware: {self.name} has no rate for {dtype}, only for {sorted(self.flops_per_s)}; "
                "choose one of these as dtype, or add its flops_per_s to the hardware file"
            )
        return self.compute_share * self.flops_per_s[dtype]

    @property
    def attainable_bytes_per_s(self) -> float:
        """The bytes per second that kernels reach."""
        return self.memory_share * self.memory_bytes_per_s


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shipped_hardware() -> list[str]:
    """Return the names of the hardware files that come with the package."""
    return sorted(file.stem for file in _SHIPPED.glob("*.json"))


def load_hardware(name: str) -> Hardware:
    """Return a shipped device by its name, or the one in a hardware file.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: the file's content is not valid.
    """
    shipped = _SHIPPED / f"{name}.json"
    file = shipped if name in shipped_hardware() else Path(name)
    if not file.is_file():
        raise FileNotFoundError(
            f"hardware: {name} is neither one of {', '.join(shipped_hardware())} nor a file; "
            "`qm-spec measure-hardware --out FILE` writes one for this machine"
        )
    return Hardware.from_dict(read_json(file))
