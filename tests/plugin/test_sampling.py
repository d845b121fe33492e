"""Samples have exactly the target's distribution under each of vLLM's settings, with drafts drawn and certain."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from scipy.stats import chisquare
from support.engine_series import run_series, texts
from support.exact_sampling import exact_distributions, first_drafts, places
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.tokenizers import get_tokenizer

import qm_spec
from qm_spec.bench.acceptance.replay import read_text
from qm_spec.drafter.checkpoint import load_drafter

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
TARGET = str(ZOO / "target")
NUM_DRAFTS, NUM_TOKENS, NUM_SAMPLES, BINS = 4, 20, 12, 10
LENGTHS = (8, 16, 30, 45)
# A right implementation fails one of all cases for one choice of seeds in 1000.
FALSE_ALARMS = 1e-3
CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 8},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.6,
        "presence_penalty": 0.5,
    },
    "bad_words": {"temperature": 0.8, "bad_words": ["the", "and", "of", "a", "to", "I", "in a"]},
    # Filled in by the tokenizer.
    "min_tokens": {
        "temperature": 0.8,
        "min_tokens": 12,
        "stop_token_ids": [" the", ",", " and", ".", "\n", " of", " a"],
    },
    "all": {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "bad_words": ["the", "of a"],
    },
}
ENGINES: dict[str, dict[str, Any]] = {
    "drawn": {"draft_sample_method": "probabilistic"},
    "certain": {"draft_sample_method": "greedy"},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = get_tokenizer(TARGET)
    lines = (ZOO / "prompts.jsonl").read_text().splitlines()[: len(LENGTHS)]
    prompts = [
        tokenizer(json.loads(line)["text"])["input_ids"][:length] for line, length in zip(lines, LENGTHS, strict=True)
    ]
    cases, batches = {}, []
    for name, case in CASES.items():
        settings = dict(case)
        if "stop_token_ids" in settings:
            settings["stop_token_ids"] = [tokenizer(text)["input_ids"][0] for text in settings["stop_token_ids"]]
        asked = {**settings, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        batches.append({"requests": [[prompt, asked] for prompt in prompts] * NUM_SAMPLES})
        if "bad_words" in settings:
            # How vLLM spells a word, with and without a space before it, is vLLM's own affair.
            params = SamplingParams(bad_words=settings["bad_words"])
            params.update_from_tokenizer(tokenizer)
            settings["bad_words_token_ids"] = params.bad_words_token_ids
        cases[name] = settings
    common = {"model": TARGET, "max_model_len": 128, "max_num_seqs": 16}
    engines = {
        name: {"seed": number, "speculative_config": {"model": "qm_spec", "num_speculative_tokens": NUM_DRAFTS, **how}}
        for number, (name, how) in enumerate(ENGINES.items())
    }
    with pytest.MonkeyPatch.context() as patch:
        # Else some drafts are copies, which are certain.
        patch.setenv("QM_SPEC_LOOKUP", "0")
        runs = run_series(tmp_path_factory.mktemp("sampling"), engines, batches, common)
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    drafter = load_drafter(ZOO / "drafter").eval()
    return SimpleNamespace(runs=runs, prompts=prompts, cases=cases, target=target, drafter=drafter)


def evenness(places: list[torch.Tensor]) -> float:
    """Return the chance that right samples are spread less evenly over their distributions."""
    return float(chisquare(torch.histc(torch.cat(places), BINS, 0.0, 1.0).tolist()).pvalue)


@pytest.fixture(scope="module")
def found(ran: Any) -> dict[Any, tuple[float, ...]]:
    """By engine and case three p-values, of all tokens but each text's first, for which nothing is drafted.

    Of the exact distribution, with what the drafter likes more than the target in front: drafts that are accepted too
    easily crowd one end. The same with what the setting makes less likely in front: so does a setting that is not
    applied to some rows. And of the distribution without the setting.
    """
    layers = ran.drafter.config.eagle_aux_hidden_state_layer_ids
    values = {}
    for engine, (number, (name, settings)) in product(ENGINES, enumerate(ran.cases.items())):
        batch, chance = ran.runs[engine]["batches"][number], torch.Generator().manual_seed(0)
        spread: list[list[torch.Tensor]] = [[], [], []]
        for place, (text,) in enumerate(texts(batch)):
            prompt = ran.prompts[place % len(ran.prompts)]
            read = read_text(ran.target, prompt, text, layers)
            exact = exact_distributions(read.logits, prompt, text, settings)
            without = exact_distributions(read.logits, prompt, text, {"temperature": settings["temperature"]})
            small = torch.finfo(torch.float64).tiny
            for into, probs, rival in (
                (spread[0], exact, first_drafts(ran, read)),
                (spread[1], exact, without),
                (spread[2], without, exact),
            ):
                into.append(places(probs, rival / probs.clamp_min(small), text[1:], chance))
        assert len(torch.cat(spread[0])) > NUM_SAMPLES * len(LENGTHS) * (NUM_TOKENS - 1) / 2
        values[engine, name] = tuple(evenness(one) for one in spread)
    return values


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_targets_distribution(found: Any, engine: str, name: str) -> None:
    """Chi-squared tests of where in its exact distribution each token lies, at 1e-3 for all cases together."""
    by_drafter, by_setting, _ = found[engine, name]
    least = FALSE_ALARMS / (2 * len(found))
    assert by_drafter > least and by_setting > least, f"p = {by_drafter:.1e}, {by_setting:.1e}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "temperature"])
def test_the_distribution_without_the_setting_does_not_fit(found: Any, engine: str, name: str) -> None:
    """Else the test above would hold nothing."""
    assert found[engine, name][2] < FALSE_ALARMS / (2 * len(found))


@pytest.mark.parametrize("engine", ENGINES)
def test_drafts_of_each_case_are_accepted(ran: Any, engine: str) -> None:
    before = 0.0
    for name, batch in zip(CASES, ran.runs[engine]["batches"], strict=True):
        accepted = batch["counters"]["vllm:spec_decode_num_accepted_tokens"]
        assert accepted - before > 50, name
        before = accepted
