"""vLLM decodes with our drafter what it decodes without: offline and over HTTP, on the shipped pair."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from offline_engine import OFFLINE, run_offline
from scipy.stats import chi2_contingency

import qm_spec
from qm_spec.bench.environment import engine_environment
from qm_spec.discovery import find_drafter

pytestmark = pytest.mark.vllm

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
TARGET = ZOO / "target"
NUM_TOKENS = 48
NUM_SAMPLES = 1500
ENGINE = {"model": str(TARGET), "max_model_len": 1024}


@pytest.fixture(scope="module")
def requests():
    """Twenty prompts of 8 to 560 tokens, so that pages fill and merge; many samples of one; one too long; one alone.

    Last, longer samples of four.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    texts = [json.loads(line)["text"] for line in (ZOO / "prompts.jsonl").read_text().splitlines()[:20]]
    lengths = [8, 16, 17, 100, 127, 128, 129, 143, 144, 145, 200, 256, 257, 300, 320, 400, 450, 500, 512, 560]
    prompts = [
        {"prompt_token_ids": tokenizer(text)["input_ids"][:length]} for text, length in zip(texts, lengths, strict=True)
    ]
    greedy, sampling = {"temperature": 0, "max_tokens": NUM_TOKENS}, {"temperature": 1, "max_tokens": 3}
    return [
        {"prompts": prompts, "sampling": greedy},
        {"prompts": prompts[:1] * NUM_SAMPLES, "sampling": sampling},
        {"prompts": [{"prompt_token_ids": [5] * 2000}], "sampling": greedy},
        {"prompts": prompts[-1:], "sampling": greedy},
        {"prompts": prompts[3:7] * 30, "sampling": {"temperature": 1, "max_tokens": NUM_TOKENS}},
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, requests):
    return run_offline(tmp_path_factory.mktemp("plain"), {**ENGINE, "seed": 0}, requests)


@pytest.fixture(scope="module")
def drafted(tmp_path_factory, requests):
    # Another seed: samples of the same noise would agree more than chance allows.
    engine = {**ENGINE, "speculative_config": qm_spec.speculative_config(TARGET), "seed": 1}
    return run_offline(tmp_path_factory.mktemp("drafted"), engine, requests)


def test_twenty_greedy_outputs_are_token_identical(plain, drafted):
    different = [n for n, (a, b) in enumerate(zip(plain["answers"][0], drafted["answers"][0], strict=True)) if a != b]
    assert not different, f"prompts {different} differ"
    assert all(len(ids) == NUM_TOKENS for ids in drafted["answers"][0])


def test_metrics_count_the_drafts(drafted, plain):
    counters = drafted["counters"][0]
    drafts, tokens = counters["vllm:spec_decode_num_drafts"], counters["vllm:spec_decode_num_draft_tokens"]
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    # A request may end before its last drafts are verified, so a few steps draft fewer than four.
    assert drafts > 0 and 3.5 * drafts < tokens <= 4 * drafts
    assert 0.2 * tokens < accepted < tokens, "the shipped drafter is accepted, but not always"
    assert not any(plain["counters"][0].values())


@pytest.mark.parametrize("position", [1, 2])
def test_sampling_has_the_targets_distribution(plain, drafted, position):
    """Two-sample chi-squared test of the second token, the first that may be a draft, and of the one behind it.

    Each fails on a right implementation for one seed in 1000.
    """
    samples = [[ids[position] for ids in answer["answers"][1]] for answer in (plain, drafted)]
    pooled = Counter(samples[0] + samples[1])
    # Tokens too rare for the approximation share one cell.
    common = [token for token, count in pooled.most_common() if count >= 20]
    counts = [[sample.count(token) for token in common] for sample in samples]
    for row in counts:
        row.append(NUM_SAMPLES - sum(row))
    p_value = chi2_contingency(counts, correction=False).pvalue
    assert len(common) >= 5
    assert p_value > 1e-3, f"p = {p_value:.1e}"


def test_sampled_drafts_are_kept_as_often_as_replay_expects(requests, drafted):
    """Drafts are drawn from the prior: the target's and the prior's distributions alone say how many are kept."""
    from transformers import AutoModelForCausalLM

    from qm_spec.bench.acceptance.replay import expected_replay, read_text
    from qm_spec.drafter.prior import QuickMergePrior

    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    drafter = QuickMergePrior.from_pretrained(find_drafter(TARGET), dtype=torch.float32).eval()
    steps = accepted = 0.0
    for prompt, text in zip(requests[4]["prompts"], drafted["answers"][4], strict=True):
        read = read_text(target, prompt["prompt_token_ids"], text, drafter.config.eagle_aux_hidden_state_layer_ids)
        expected = expected_replay(drafter, read, 4)
        steps, accepted = steps + expected.steps, accepted + expected.accepted
    counted = [
        drafted["counters"][4][name] - drafted["counters"][3][name]
        for name in ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_drafts")
    ]
    # Of about 2500 steps with a deviation of 1.5 tokens each; twice that, as texts differ, is 3 %.
    assert counted[0] / counted[1] == pytest.approx(accepted / steps, rel=0.1)
    assert accepted / steps > 0.5


def test_a_prompt_longer_than_the_model_is_refused_and_the_engine_goes_on(plain, drafted):
    for answer in (plain, drafted):
        assert "1024" in answer["errors"][2] and "2000" in answer["errors"][2], answer["errors"]
    assert drafted["errors"][3] is None and drafted["answers"][3] == plain["answers"][3]


def test_vllms_own_loop_drafts_the_same(tmp_path, requests, drafted):
    """Without the proposer patch the same model runs through vLLM's draft loop and attention backend."""
    engine = {**ENGINE, "speculative_config": qm_spec.speculative_config(TARGET)}
    unpatched = OFFLINE.replace(
        "from vllm import LLM",
        "from qm_spec.integrations.vllm_plugin import compat\n"
        "apply = compat.apply\n"
        "compat.apply = lambda patch: patch.target.endswith('.propose') or apply(patch)\n"
        "from vllm import LLM",
    )
    assert unpatched != OFFLINE
    answer = run_offline(tmp_path, engine, requests[:1], unpatched)
    assert answer["answers"][0] == drafted["answers"][0]
    name = "vllm:spec_decode_num_accepted_tokens"
    # Groups are merged up to K tokens later there, so drafts may differ a little, acceptance hardly.
    theirs, ours = answer["counters"][0][name], drafted["counters"][0][name]
    assert abs(theirs - ours) < 0.05 * ours


def test_prefix_caching_keeps_outputs_and_acceptance(tmp_path, requests, plain, drafted):
    """The same batch twice: the second time its pages come from the cache, merged already."""
    engine = {
        **ENGINE,
        "speculative_config": qm_spec.speculative_config(TARGET),
        "enable_prefix_caching": True,
        "max_num_seqs": 4,
    }
    answer = run_offline(tmp_path, engine, [requests[0], requests[0]])
    assert answer["answers"] == [plain["answers"][0]] * 2
    assert answer["counters"][1]["vllm:spec_decode_num_accepted_tokens"] > 0


@contextmanager
def server(arguments, log):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(TARGET), *arguments),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "512", "--served-model-name", "novels"),
    ]
    environment = {**engine_environment("cpu"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def complete(url, ids):
    body = {"model": "novels", "prompt": ids, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    body["return_token_ids"] = True
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["token_ids"]


def test_serve_by_name_over_http(tmp_path, requests, plain):
    with server(["--speculative-model", "qm_spec"], tmp_path / "log") as url:
        for number in (3, 11):
            assert complete(url, requests[0]["prompts"][number]["prompt_token_ids"]) == plain["answers"][0][number][:32]
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
            metrics = reply.read().decode()
    accepted = [line for line in metrics.splitlines() if line.startswith("vllm:spec_decode_num_accepted_tokens_total")]
    assert accepted and float(accepted[0].split()[-1]) > 0


def test_serve_by_speculative_config_over_http(tmp_path, requests, plain):
    config = {"method": "eagle3", "model": str(find_drafter(TARGET)), "num_speculative_tokens": 2}
    with server(["--speculative-config", json.dumps(config)], tmp_path / "log") as url:
        assert complete(url, requests[0]["prompts"][5]["prompt_token_ids"]) == plain["answers"][0][5][:32]
