"""A drafter's file of weights, opened without reading them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qm_spec.discovery.files import shown


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a `model.safetensors` as `safetensors.safe_open` does: its header is compared with the file's length.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is corrupt or truncated.
    """
    name = shown(file)
    if not file.is_file():
        raise FileNotFoundError(f"drafter: {name} is missing; copy the whole folder or train it again")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(
            f"drafter: {name} is corrupt or truncated ({shown(error)}); copy it or train it again"
        ) from error
