"""Fixtures that every test file may use."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qm_spec.bench.settings import BenchmarkSettings

ROOT = Path(__file__).resolve().parents[1]
# What is drafted must not depend on how busy the machine is; the tests of that turn it on.
os.environ["QM_SPEC_ADAPT"] = "0"
# Several processes of two threads each on two cores wait for each other more than they work.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what starts vLLM where vLLM is not installed."""
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


@pytest.fixture(autouse=True)
def package_log() -> Iterator[None]:
    """Give the package's log back to the root logger, where `caplog` listens, if a test has registered the plug-in."""
    yield
    logging.getLogger("qm_spec").parent = logging.getLogger()


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


# A benchmark whose engines are played by tests/fake_engine.py


@pytest.fixture
def engine_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The command of the engines, with a folder of its own for what they are told and what they leave."""
    # These need no rest between turns.
    monkeypatch.setattr("qm_spec.bench.engine.jobs.REST_S", 0)
    monkeypatch.setattr("qm_spec.bench.engine.process._POLL_S", 0.01)
    folder = tmp_path / "engine"
    folder.mkdir()
    script = Path(shutil.copy(ROOT / "tests" / "fake_engine.py", folder))
    return (sys.executable, str(script))


@pytest.fixture
def faults(engine_command: tuple[str, ...]) -> Callable[..., None]:
    """Say by method how engines misbehave: `faults(ngram="crash")`."""
    return lambda **by_method: Path(engine_command[1]).with_name("FAULTS.json").write_text(json.dumps(by_method))


@pytest.fixture
def starts(engine_command: tuple[str, ...]) -> Callable[[], list[list[str]]]:
    """Return for each engine started so far its method, process, parent process and first prompt."""
    file = Path(engine_command[1]).with_name("starts")
    return lambda: [line.split() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def turns(engine_command: tuple[str, ...]) -> Callable[[], list[list[str]]]:
    """Return for each measured shard so far its method, prompts and process."""
    file = Path(engine_command[1]).with_name("turns")
    return lambda: [line.split() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def benchmark_settings(tmp_path: Path) -> Callable[..., BenchmarkSettings]:
    """Settings for five prompts of 1 to 5 tokens on a target that knows five words and has no weights."""
    from tiny_pair import write_target
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from qm_spec.bench.settings import BenchmarkSettings

    # No token ends a text: outputs count through small ids.
    target = write_target(tmp_path / "target", eos_token_id=None)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate("abcde?")}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(target)
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"p{i}", "text": f"{word} " * (i + 1), "category": ("even", "odd")[i % 2]}
        for i, word in enumerate("abcde")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: Any) -> BenchmarkSettings:
        fields = {"methods": ("none", "ngram"), "prompts": str(file), "max_tokens": 5, "repeats": 2}
        return BenchmarkSettings(target=target, out=tmp_path / "out", **{**fields, **changes})

    return make
