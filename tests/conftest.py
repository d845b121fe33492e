"""Fixtures that every test file may use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# As users have it, who set nothing.
os.environ.pop("QM_SPEC_ADAPT", None)
# Several processes of two threads each on two cores wait for each other more than they work.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what starts vLLM where vLLM is not installed; where it is, begin with the files that do.

    They take longest, and several processes are done together only if short files are left at the end.
    """
    long = {item.path for item in items if item.get_closest_marker("vllm")}
    items.sort(key=lambda item: item.path not in long)
    if find_spec("vllm") is None:
        missing = pytest.mark.skip(reason="vLLM is not installed: run ./install.sh")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(missing)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Look up data that is too large for the repository, such as `shared("models/stories260K")`.

    It stands in the folder `shared` beside the repository, or in `$QM_SPEC_SHARED`; the test that asks for
    what is not there is skipped.
    """
    folder = Path(os.environ.get("QM_SPEC_SHARED", ROOT.parent / "shared"))

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"{name} is not in the shared folder beside the repository (or set QM_SPEC_SHARED)")
        return path

    return find


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched on first use; who asks is skipped where it cannot be had."""
    from qm_spec.targets import fetch_target

    try:
        return fetch_target("smollm2-135m-instruct")
    except (ConnectionError, ModuleNotFoundError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def most_drafts() -> Iterator[None]:
    """Have the engines of a file draft the most in every step, for tests of what is drafted.

    By default they draft where it pays, which depends on how busy the machine is.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QM_SPEC_ADAPT", "0")
        yield


@pytest.fixture(autouse=True)
def package_log() -> Iterator[None]:
    """Give the package's log back to the root logger, where `caplog` listens, if a test has registered the plug-in."""
    yield
    logging.getLogger("qm_spec").parent = logging.getLogger()
