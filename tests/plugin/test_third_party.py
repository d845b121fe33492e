"""A model that we did not make: train a drafter for it, and decode with it in vLLM."""

import pytest
import torch
from support.offline_engine import run_offline
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import qm_spec
from qm_spec.bench.acceptance.replay import write_continuations
from qm_spec.cli import app
from qm_spec.discovery import target_fingerprint

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

PROMPTS = ["Once upon a time there was a", "Lily and Tom went to the park.", "The big dog said", "One day"]


def test_a_drafter_for_a_third_party_model_is_accepted_and_changes_nothing(shared, tmp_path, monkeypatch):
    target = shared("models/stories260K")
    (tmp_path / "text.txt").write_text(
        "Once upon a time there was a little girl. She had a dog. One day the dog ran. " * 40
    )
    # The place where `qm_spec` looks for drafters of targets whose own folder is read-only.
    home = tmp_path / "home"
    monkeypatch.setenv("QM_SPEC_HOME", str(home))
    out = home / target_fingerprint(target)
    done = CliRunner().invoke(
        app,
        [
            *("train", "--target", str(target), "--data", str(tmp_path / "text.txt"), "--out", str(out)),
            *("--max-steps", "80", "--rows-per-step", "256", "--sequence-length", "256", "--rows-per-document", "64"),
            *("--regenerated-tokens", "40000", "--window", "64", "--save-steps", "80"),
        ],
    )
    assert done.exit_code == 0, done.output
    engine = {"model": str(target), "max_model_len": 400}
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    requests = [{"prompts": asked, "sampling": {"temperature": 0, "max_tokens": 200}}]
    drafted = run_offline(tmp_path, {**engine, "speculative_config": qm_spec.speculative_config(target)}, requests)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assert drafted["answers"] == [write_continuations(model, prompts, 200)]
    counters = drafted["counters"][0]
    length = 1 + counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_drafts"]
    assert length > 1.5, f"acceptance length {length:.2f} after a training of seconds"
