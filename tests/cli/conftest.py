"""A tiny pair, and the command line in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: run ./install.sh")

from support.tiny_pair import write_drafter, write_target
from typer.testing import CliRunner

from qm_spec.cli import app
from qm_spec.discovery import search


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of drafters and an empty zoo, whatever the machine holds."""
    monkeypatch.setenv("QM_SPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(search, "ZOO", tmp_path / "zoo")
    return tmp_path / "home"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture
def drafter(tmp_path: Path, target: Path) -> Path:
    return write_drafter(tmp_path / "drafter", target)


@pytest.fixture
def run() -> Any:
    """Run a command; what it raises is in the result, as `qm_spec.__main__` would see it."""
    return lambda *arguments: CliRunner().invoke(app, [str(one) for one in arguments])
