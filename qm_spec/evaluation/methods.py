"""What each method asks of vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qm_spec.discovery.checks import vllm_settings
from qm_spec.discovery.files import read_json
from qm_spec.drafter.suffix_index import SURE_LENGTH
from qm_spec.evaluation.environment import engine_environment
from qm_spec.evaluation.settings import DRAFTER_METHODS, LOOKUP_METHOD, PLAIN_METHODS, UNCOMPILED_METHOD
from qm_spec.evaluation.shards import EngineSpec

DEFAULT_SPECULATIVE_TOKENS = 4
# Longest n-gram that is looked up; longer repeats are rare in running text.
NGRAM_PROMPT_LOOKUP_MAX = 4


def without_far_memory(drafter: Path, folder: Path) -> Path:
    """Make a drafter in `folder` with the same weights, but nothing kept of the tokens behind its window.

    Returns:
        `folder`, whose files are links into `drafter` except for the changed `config.json`.
    """
    folder.mkdir(parents=True)
    for file in drafter.resolve().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = read_json(drafter / "config.json")
    config["quickmerge"]["schedule"] = [0]
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def engine_without_far_memory(engine: EngineSpec, folder: Path) -> EngineSpec:
    """Return the engine with its drafter replaced by one made in `folder`; see `without_far_memory`."""
    assert engine.speculative_config is not None
    drafter = without_far_memory(Path(engine.speculative_config["model"]), folder)
    return replace(engine, speculative_config={**engine.speculative_config, "model": str(drafter)})


def method_environment(method: str, device: str) -> dict[str, str]:
    """Return the environment of a method's engine process on `device`, "cpu" or "cuda"."""
    environment = engine_environment(device)
    if method == UNCOMPILED_METHOD:
        environment["QM_SPEC_BACKEND"] = "reference"
    if method == LOOKUP_METHOD:
        environment["QM_SPEC_LOOKUP"] = str(SURE_LENGTH)
    return environment


def speculative_config(method: str, num_speculative_tokens: int | None, drafter: Path | None) -> dict[str, Any] | None:
    """Return vLLM's `speculative_config` for a method, None for plain decoding.

    Args:
        num_speculative_tokens: K; None leaves it to the plug-in, and is 4 for n-gram lookup.
        drafter: the folder that a method of `DRAFTER_METHODS` drafts with; other methods have none.
    """
    if method in PLAIN_METHODS:
        return None
    if method in DRAFTER_METHODS:
        assert drafter is not None
        return vllm_settings(drafter, num_speculative_tokens)
    return {
        "method": "ngram",
        "num_speculative_tokens": num_speculative_tokens or DEFAULT_SPECULATIVE_TOKENS,
        "prompt_lookup_max": NGRAM_PROMPT_LOOKUP_MAX,
    }
