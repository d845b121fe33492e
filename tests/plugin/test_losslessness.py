"""vLLM's V1 runner decodes with our drafter what it decodes without, whatever the engine, whatever the request.

Engines come in a covering set: not every combination of settings has one, but every pair of values has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.engine_series import run_series, texts

import qm_spec

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
TARGET = str(ZOO / "target")
MAX_MODEL_LEN = 512
# Longer prompts than a step has tokens are read in pieces; 32 requests with 16 drafts each are more than its tokens.
CHUNK = 64
LENGTHS = (8, 24, 33, 70, 17, 130)
SETTINGS: dict[str, tuple[Any, ...]] = {
    "max_num_seqs": (1, 8, 32),
    "num_speculative_tokens": (1, 4, 16),
    "enable_prefix_caching": (False, True),
    "max_num_batched_tokens": (2048, CHUNK),
    "enforce_eager": (True, False),
}
EAGER = {**SETTINGS, "enforce_eager": (True,)}


def pairs_of(engine: Mapping[str, Any]) -> set[Any]:
    """Return the pairs of values that an engine has."""
    return set(combinations(engine.items(), 2))


def covering(settings: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return few engines in which every pair of values of two settings occurs.

    Always the next engine is the one with the most pairs that none before it has.
    """
    engines = [dict(zip(settings, values, strict=True)) for values in product(*settings.values())]
    missing = set().union(*map(pairs_of, engines))
    chosen = []
    while missing:
        chosen.append(max(engines, key=lambda engine: len(pairs_of(engine) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


def as_given(engine: Mapping[str, Any], drafter: bool = True) -> dict[str, Any]:
    """Return what `vllm.LLM` is given for an engine of the set."""
    given = {name: value for name, value in engine.items() if name != "num_speculative_tokens"}
    if drafter:
        given["speculative_config"] = {
            "model": "qm_spec",
            "num_speculative_tokens": engine["num_speculative_tokens"],
        }
    return given


@pytest.mark.parametrize("settings", [SETTINGS, EAGER])
def test_the_covering_set_has_every_pair_of_values(settings: dict[str, tuple[Any, ...]]) -> None:
    engines = covering(settings)
    for (first, values), (second, others) in combinations(settings.items(), 2):
        for pair in product(values, others):
            assert any((engine[first], engine[second]) == pair for engine in engines), (first, second, pair)
    # Three values of two settings make nine pairs.
    assert 9 <= len(engines) < len([*product(*settings.values())]) / 3


# Greedy


def cut(texts: Sequence[str], target: str | Path, count: int) -> list[list[int]]:
    """Return so many prompts of `LENGTHS` tokens: pieces of the texts, first the first ones of each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    pieces, starts = [tokenizer(text)["input_ids"] for text in texts], [0] * len(texts)
    prompts: list[list[int]] = []
    while len(prompts) < count:
        number, length = len(prompts) % len(texts), LENGTHS[len(prompts) % len(LENGTHS)]
        # A text that is used up begins anew, one token later.
        if starts[number] >= len(pieces[number]):
            starts[number] = 1
        prompts.append(pieces[number][starts[number] : starts[number] + length])
        starts[number] += length
    return prompts


def differing(answers: Any, plain: Any) -> list[int]:
    """Return which requests have another output than without drafts."""
    assert len(answers) == len(plain) > 0
    return [number for number, pair in enumerate(zip(answers, plain, strict=True)) if pair[0] != pair[1]]


def check_covering(
    folder: Path, engines: list[dict[str, Any]], target: str | Path, prompts: list[list[int]], num_tokens: int
) -> None:
    """Assert that each engine of a covering set decodes all prompts as an engine without a drafter does."""
    settings = {"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True}
    batch = {"requests": [[prompt, settings] for prompt in prompts]}
    common = {"model": str(target), "max_model_len": MAX_MODEL_LEN}
    named = {f"{number} {[*engine.values()]}": engine for number, engine in enumerate(engines)}
    eager = {name: as_given(engine) for name, engine in named.items() if engine["enforce_eager"]}
    runs = run_series(folder, {"plain": {"max_num_seqs": 8}, **eager}, [batch], common)
    for name, engine in named.items():
        if name not in eager:
            runs |= run_series(folder, {name: as_given(engine)}, [batch], common)
    plain = texts(runs.pop("plain")["batches"][0])
    assert all(len(text) == num_tokens for (text,) in plain) and len(plain) == len(prompts)
    assert runs.keys() == named.keys()
    for name, run in runs.items():
        (done,) = run["batches"]
        assert not differing(texts(done), plain), name
        # An engine that drafts nothing proves nothing.
        assert done["counters"]["vllm:spec_decode_num_accepted_tokens"] > len(prompts), name
        assert done["pages_lost"] == 0, name


def novels(count: int) -> list[list[int]]:
    lines = (ZOO / "prompts.jsonl").read_text().splitlines()
    return cut([json.loads(line)["text"] for line in lines], TARGET, count)


def test_24_greedy_outputs_are_those_without_drafts_on_a_covering_set_of_eager_engines(tmp_path: Path) -> None:
    check_covering(tmp_path, covering(EAGER), TARGET, novels(24), 24)


def test_24_greedy_outputs_are_those_without_drafts_on_a_compiled_engine(tmp_path: Path) -> None:
    compiled = [engine for engine in covering(SETTINGS) if not engine["enforce_eager"]]
    check_covering(tmp_path, compiled[:1], TARGET, novels(24), 24)


@pytest.mark.long
def test_500_greedy_outputs_are_those_without_drafts_on_a_covering_set_of_engines(tmp_path: Path) -> None:
    check_covering(tmp_path, covering(SETTINGS), TARGET, novels(500), 24)


@pytest.mark.long
def test_500_greedy_outputs_of_smollm2_are_those_without_drafts_on_a_covering_set_of_engines(
    smollm2: Path, root: Path, tmp_path: Path
) -> None:
    lines = (root / "benchmarks" / "data" / "spec_bench.jsonl").read_text().splitlines()
    asked = [json.loads(line)["turns"][0] for line in lines]
    check_covering(tmp_path, covering(SETTINGS), smollm2, cut(asked, smollm2, 500), 16)
