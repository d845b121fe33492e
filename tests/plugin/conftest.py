"""What tests of the plug-in share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def plugin_log() -> Iterator[list[logging.LogRecord]]:
    """What our logger under vLLM's is told; `caplog` hears it once, twice or never, as vLLM has set up logging."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.plugins.qm_spec")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)
