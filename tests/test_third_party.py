"""A model that we did not make: train a drafter for it, and decode with it in vLLM."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import qm_spec
from qm_spec.cli import app
from qm_spec.evaluation.environment import engine_environment

pytestmark = pytest.mark.vllm

DECODE = """
import json, sys
job = json.load(open(sys.argv[1]))
from vllm import LLM, SamplingParams
llm = LLM(job["target"], max_model_len=400, dtype="float32", enforce_eager=True, disable_log_stats=False,
          speculative_config=job["speculative_config"])
sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
answers = [list(o.outputs[0].token_ids) for o in llm.generate(job["prompts"], sampling, use_tqdm=False)]
counters = {m.name: m.value for m in llm.get_metrics() if m.name.startswith("vllm:spec_decode") and hasattr(m, "value")}
json.dump({"answers": answers, "counters": counters}, open(sys.argv[2], "w"))
"""

PROMPTS = ["Once upon a time there was a", "Lily and Tom went to the park.", "The big dog said", "One day"]


def decode(folder, target, speculative_config):
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"target": str(target), "speculative_config": speculative_config, "prompts": PROMPTS}))
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(job), str(result)],
        env=engine_environment("cpu"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(result.read_text())


def test_a_drafter_for_a_third_party_model_is_accepted_and_changes_nothing(shared, tmp_path, monkeypatch):
    target = shared("models/stories260K")
    (tmp_path / "text.txt").write_text(
        "Once upon a time there was a little girl. She had a dog. One day the dog ran. " * 40
    )
    # The place where `qm_spec` looks for drafters of targets whose own folder is read-only.
    home = tmp_path / "home"
    monkeypatch.setenv("QM_SPEC_HOME", str(home))
    from qm_spec.discovery import target_fingerprint

    out = home / target_fingerprint(target)
    done = CliRunner().invoke(
        app,
        [
            *("train", "--target", str(target), "--data", str(tmp_path / "text.txt"), "--out", str(out)),
            *("--max-steps", "80", "--batch-size", "4", "--sequence-length", "256", "--rows-per-window", "64"),
            *("--regenerated-tokens", "40000", "--window", "64", "--save-steps", "80"),
        ],
    )
    assert done.exit_code == 0, done.output
    plain = decode(tmp_path, target, None)
    drafted = decode(tmp_path, target, qm_spec.speculative_config(target))
    assert drafted["answers"] == plain["answers"]
    counters = drafted["counters"]
    length = 1 + counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_drafts"]
    assert length > 1.5, f"acceptance length {length:.2f} after a training of seconds"
