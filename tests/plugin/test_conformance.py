"""Every architecture that we know a tiny model of decodes with a drafter what it decodes without, in as many groups."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.architectures import ARCHITECTURES, REFUSED, Architecture, write_pair
from support.several_engines import run_engines
from vllm.engine.arg_utils import EngineArgs

from qm_spec.integrations.vllm_plugin import register

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

NUM_TOKENS = 48
# More tokens than a window of the targets has, and than one chunk of a prompt.
LENGTHS = (4, 30, 90, 200)
ENGINE = {"max_model_len": 448, "max_num_seqs": 4, "max_num_batched_tokens": 128}
QUICK = [architecture for architecture in ARCHITECTURES if architecture.quick]
REST = [architecture for architecture in ARCHITECTURES if not architecture.quick]


def run(folder: Path, architectures: Iterable[Architecture]) -> dict[str, list[dict[str, Any]]]:
    """Return for each architecture what an engine without a drafter answers, and one with."""
    prompts = [
        {"prompt_token_ids": [(7 * place * place + 3 * length + 5) % 61 + 3 for place in range(length)]}
        for length in LENGTHS
    ]
    engines = []
    for architecture in architectures:
        target, drafter = write_pair(folder / architecture.name, architecture)
        plain = {**ENGINE, "model": str(target), "dtype": architecture.dtype}
        engines += [plain, {**plain, "speculative_config": {"model": str(drafter)}}]
    request = {"prompts": prompts, "sampling": {"temperature": 0, "max_tokens": NUM_TOKENS}}
    results = run_engines(folder, engines, [request])
    assert [result["error"] for result in results] == [None] * len(engines)
    pairs = zip(results[::2], results[1::2], strict=True)
    return {architecture.name: list(pair) for architecture, pair in zip(architectures, pairs, strict=True)}


def hold(architecture: Architecture, plain: dict[str, Any], drafted: dict[str, Any]) -> None:
    assert drafted["answers"] == plain["answers"]
    # An answer of one token over and over would be right by any cache.
    assert min(len(set(answer)) for answer in plain["answers"][0]) > 3
    assert "draft_tokens" not in plain["counters"]
    # Most drafts of an untrained drafter are wrong: what they left in the cache is written over.
    assert drafted["counters"]["draft_tokens"] > drafted["counters"]["accepted_tokens"] + NUM_TOKENS
    assert (plain["groups"], drafted["groups"]) == architecture.groups
    assert drafted["groups"] <= plain["groups"] + 1


@pytest.fixture(scope="module")
def quick(most_drafts: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.mark.parametrize("architecture", QUICK, ids=lambda architecture: architecture.name)
def test_an_architecture_decodes_the_same_with_as_many_groups(
    architecture: Architecture, quick: dict[str, list[dict[str, Any]]]
) -> None:
    hold(architecture, *quick[architecture.name])


@pytest.mark.long
@pytest.mark.parametrize("architecture", REST, ids=lambda architecture: architecture.name)
def test_another_architecture_decodes_the_same_with_as_many_groups(architecture: Architecture, tmp_path: Path) -> None:
    hold(architecture, *run(tmp_path, [architecture])[architecture.name])


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda architecture: architecture.name)
def test_an_architecture_without_hidden_states_is_refused_before_it_is_loaded(
    architecture: Architecture, tmp_path: Path
) -> None:
    register.register()
    target, drafter = write_pair(tmp_path, architecture)
    with pytest.raises(ValueError, match=f"vLLM's {architecture.name} gives out no auxiliary hidden states"):
        EngineArgs(model=str(target), dtype="float32", spec_model=str(drafter)).create_engine_config()


def test_the_page_of_architectures_names_each_with_its_groups(root: Path) -> None:
    page = (root / "docs/reference/architectures.md").read_text()
    for architecture in ARCHITECTURES:
        before, after = architecture.groups
        assert f"\n| `{architecture.name}` | yes, {architecture.dtype} | yes | yes | {before} | {after} |" in page
    for architecture in REFUSED:
        assert f"\n| `{architecture.name}` | refused |" in page
