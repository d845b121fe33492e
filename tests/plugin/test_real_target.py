"""SmolLM2-135M-Instruct and the drafter that is shipped for it, in vLLM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.offline_engine import run_offline

import qm_spec

ZOO = Path(qm_spec.__file__).parent / "zoo" / "smollm2-135m-instruct"
QUESTIONS = [
    "Explain how a bicycle stays upright.",
    "Write a short poem about the sea.",
    "Tom has 12 apples and gives 3 to each of his 2 sisters. How many are left?",
    "Write a Python function that reverses a list.",
    "Translate to English: Das Museum ist heute geschlossen.",
    "Who wrote Faust?",
]
NUM_TOKENS = 96

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True)["input_ids"]


@pytest.fixture(scope="module")
def decoded(smollm2: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What vLLM writes without a drafter, and with ours but without lookup: all of them at once, in float32."""
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    request = {"prompts": asked, "sampling": {"temperature": 0, "max_tokens": NUM_TOKENS}}
    plain = {"model": str(smollm2), "max_model_len": 1024, "max_num_seqs": len(prompts)}
    drafted = {**plain, "speculative_config": qm_spec.speculative_config(str(smollm2))}
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QM_SPEC_LOOKUP", "0")
        for name, engine in {"plain": plain, "drafted": drafted}.items():
            runs[name] = run_offline(tmp_path_factory.mktemp(name), engine, [request])
    return runs


def test_the_shipped_drafter_changes_no_token_in_float32(decoded: dict[str, dict]) -> None:
    assert decoded["drafted"]["answers"] == decoded["plain"]["answers"]


def test_the_trainers_estimate_of_acceptance_is_vllms_count(
    smollm2: Path, prompts: list[list[int]], decoded: dict[str, dict]
) -> None:
    from transformers import AutoModelForCausalLM

    from qm_spec.drafter.anchors import engine_steps
    from qm_spec.drafter.checkpoint import load_drafter
    from qm_spec.training.documents import Document, DocumentBatches
    from qm_spec.training.drafter import DraftTraining

    target = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    model = DraftTraining(load_drafter(ZOO / "drafter").float(), target).eval()
    (answers,) = decoded["drafted"]["answers"]
    documents = [Document.answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    batches = DocumentBatches(documents, rows_per_batch=NUM_TOKENS)
    steps: list[int] = []
    with torch.no_grad():
        for number in range(len(batches)):
            accepted = model(**batches[number])["accepted"].numpy()
            steps += [step for row in accepted for step in engine_steps(row[row >= 0])]
    (counters,) = decoded["drafted"]["counters"]
    drafts = counters["vllm:spec_decode_num_drafts"]
    assert drafts > 100, "enough steps that 5 % are more than one of them"
    counted = 1 + counters["vllm:spec_decode_num_accepted_tokens"] / drafts
    assert 1 + np.mean(steps) == pytest.approx(counted, rel=0.05)
