"""A benchmark whose engines are played by `support/fake_engine.py`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import fake_engine
from support.tiny_pair import write_target

if TYPE_CHECKING:
    from qm_spec.bench.settings import BenchmarkSettings


@pytest.fixture
def engine_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The command of the engines, with a folder of its own for what they are told and what they leave."""
    # These need no rest between turns.
    monkeypatch.setattr("qm_spec.bench.engine.jobs.REST_S", 0)
    monkeypatch.setattr("qm_spec.bench.engine.process._POLL_S", 0.01)
    folder = tmp_path / "engine"
    folder.mkdir()
    script = Path(shutil.copy(fake_engine.__file__, folder))
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
