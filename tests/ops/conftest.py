"""What the kernels' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def outputs_start_as_nan() -> Iterator[None]:
    """Fill what is allocated with NaN, or the largest integer, so that an element left out is seen; seed torch."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
