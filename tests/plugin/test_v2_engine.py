"""vLLM's V2 engine with our drafter: in batches, sampled, preempted, aborted; each step keeps what a replay expects.

Where only outputs were compared, a drafter that has lost its memory would go unnoticed. So each step of each request
is held to what the target and the drafter say for its text in `bench/acceptance/replay.py`.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from scipy.stats import chisquare
from support.exact_sampling import first_drafts
from support.offline_engine import run_offline
from support.v2_engine import INTERPRETED, NOISE
from transformers import AutoModelForCausalLM, AutoTokenizer

import qm_spec
from qm_spec.bench.acceptance.replay import accepted_everywhere, chances_everywhere, read_text
from qm_spec.drafter.checkpoint import load_drafter

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
NUM_DRAFTS, NUM_TOKENS = 4, 12
# Tokens of the prompts. 144 fill the window of 128 and a group of 16 behind it; pages have 32.
LENGTHS = (8, 16, 17, 150, 31, 57, 30, 200, 32, 33, 48, 64, 100, 152, 40, 65, 24, 145, 63, 20)
# The engine of certain drafts has 8 pages. These prompts take all of them, and two of them soon need one more.
PREEMPTED = (5, 13, 19)
SHORT = (0, 1, 2, 4, 6, 19)
NUM_SAMPLED, SAMPLED_TOKENS = 18, 20
# Longer than the outputs.
LETTERS, SHAPED = "[a-z ]{200}", (0, 8)

# Runs batches of requests step by step. Notes of each request its tokens, and of each step in which it had some how
# many drafts were verified and how many tokens came of it; of each batch what the engine has counted.
STEPPED = """
import json, sys
job = json.load(open(sys.argv[1]))
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
drafted, speculators = {}, set()
#PATCHES
llm = LLM(dtype="float32", enforce_eager=True, disable_log_stats=False, **job["engine"])
engine = llm.llm_engine
core = engine.engine_core.engine_core
scheduler, scheduled, mixed = core.scheduler, {}, []
schedule, pool = scheduler.schedule, scheduler.kv_cache_manager.block_pool
#PREPARED


def noted_schedule(*args):
    output = schedule(*args)
    scheduled.clear()
    for name in output.num_scheduled_tokens:
        scheduled[name.partition("-")[0]] = len(output.scheduled_spec_decode_tokens.get(name, ()))
    requests = [scheduler.requests[name] for name in output.num_scheduled_tokens]
    reads = any(request.num_computed_tokens < request.num_prompt_tokens for request in requests)
    mixed.append(reads and any(scheduled.values()))
    return output


scheduler.schedule = noted_schedule


def run(name, requests, at_once, abort=None):
    waiting, texts, steps = [*enumerate(requests)], [[] for _ in requests], [[] for _ in requests]
    free, running, first = pool.get_num_free_blocks(), 0, len(mixed)
    while waiting or engine.has_unfinished_requests():
        while waiting and running < at_once:
            number, (prompt, settings) = waiting.pop(0)
            settings = {"ignore_eos": True, **settings}
            if "regex" in settings:
                settings["structured_outputs"] = StructuredOutputsParams(regex=settings.pop("regex"))
            sampling = SamplingParams(output_kind=RequestOutputKind.DELTA, detokenize=False, **settings)
            engine.add_request(f"{name}.{number}", {"prompt_token_ids": prompt}, sampling)
            running += 1
        for output in engine.step():
            number, tokens = int(output.request_id.rpartition(".")[2]), output.outputs[0].token_ids
            if tokens:
                texts[number] += tokens
                steps[number].append([scheduled[output.request_id], len(tokens)])
            running -= output.finished
        if abort is not None and len(texts[abort]) > 2:
            engine.abort_request([f"{name}.{abort}"])
            running, abort = running - 1, None
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    # What a request held may be given back with the next schedule.
    engine.step()
    return {
        "texts": texts,
        "steps": steps,
        "free": [free, pool.get_num_free_blocks()],
        "mixed": sum(mixed[first:]),
        "counters": {name: value for name, value in counters.items() if "spec_decode" in name or "preempt" in name},
    }


batches = [run(str(number), **batch) for number, batch in enumerate(job["requests"])]
result = {"batches": batches, "drafted": drafted, "speculators": [*speculators]}
json.dump(result, open(sys.argv[2], "w"))
"""
# Notes what is drafted for a request behind how many tokens.
NOTED_V1 = """
from qm_spec.integrations.vllm_plugin.session import DraftSession
draft_v1 = DraftSession.draft


def noted_v1(self, step):
    drafts = draft_v1(self, step)
    for request, verified, tokens in zip(step.requests, step.num_verified.tolist(), drafts.token_ids.tolist()):
        drafted[f"{request.state.req_id.partition('-')[0]} {verified}"] = tokens
    return drafts


DraftSession.draft = noted_v1
"""
NOTED_V2 = """
from qm_spec.integrations.vllm_plugin.speculator import QuickMergeSpeculator
propose_v2 = QuickMergeSpeculator.propose


def noted_v2(self, input_batch, *given, **settings):
    drafts = propose_v2(self, input_batch, *given, **settings)
    if not settings.get("dummy_run"):
        speculators.add(type(self).__name__)
        num_rejected = given[5]
        lengths = (input_batch.seq_lens[: len(input_batch.req_ids)] - num_rejected).tolist()
        for name, verified, tokens in zip(input_batch.req_ids, lengths, drafts.tolist()):
            drafted[f"{name.partition('-')[0]} {verified}"] = tokens
    return drafts


QuickMergeSpeculator.propose = noted_v2
"""
# In the place of CUDA graphs: the loop runs on as many rows as the engine may ever have, whatever the batch.
PADDED = """
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
speculator = core.model_executor.driver_worker.worker.model_runner.speculator
rows = speculator.max_num_reqs


class Padded:
    def dispatch(self, *args, **settings):
        return BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=rows, num_reqs=rows)

    def specialize_spec_tokens(self, graph, num_drafts):
        self.num_drafts = num_drafts
        return graph

    def run_fullgraph(self, graph):
        [[group]] = [groups for groups in speculator.attn_groups if groups]
        table = speculator.block_tables.input_block_tables[group.kv_cache_group_id]
        metadata = {speculator.model.model.attn.layer_name: SimpleNamespace(block_table=table)}
        speculator._draft_all(rows, rows, metadata, None, None, CUDAGraphMode.NONE, self.num_drafts)
        speculators.add("padded")


speculator.decode_cudagraph_manager = Padded()
"""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "target")
    texts = [json.loads(line)["text"] for line in (ZOO / "prompts.jsonl").read_text().splitlines()[: len(LENGTHS)]]
    return [tokenizer(text)["input_ids"][:length] for text, length in zip(texts, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def engines(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """V2 without drafts; with ours, drawn; with ours, certain, and as of padded graphs; V1 with ours. Two at a time."""

    def batch(numbers: Any, at_once: int = 8, abort: int | None = None, **settings: Any) -> dict[str, Any]:
        settings = {"temperature": 0, "max_tokens": NUM_TOKENS, **settings}
        return {"requests": [[prompts[n], settings] for n in numbers], "at_once": at_once, "abort": abort}

    twenty, shaped = range(len(prompts)), {"regex": LETTERS, "ignore_eos": False}
    many = [SHORT[number % len(SHORT)] for number in range(NUM_SAMPLED)]
    sampled = {"temperature": 1, "max_tokens": SAMPLED_TOKENS}
    seeded = batch(SHORT[:1], temperature=1, seed=5)
    together = {**seeded, "requests": [*batch(SHORT[1:3])["requests"], *seeded["requests"]]}
    together["requests"] += batch(SHORT[:1], temperature=1, seed=6)["requests"]
    # A replay compares K tokens behind the last step.
    plainly = [batch(twenty, max_tokens=NUM_TOKENS + NUM_DRAFTS - 1), batch(SHAPED, **shaped)]
    drawn = [
        batch(twenty),
        batch(SHAPED, **shaped),
        batch(many, **sampled),
        seeded,
        together,
        batch(SHORT[:4], abort=1),
    ]
    # It would outlive the others, and hold its pages when they have ended.
    drawn[-1]["requests"][1:2] = batch(SHORT[1:2], max_tokens=60)["requests"]
    # Of a page each, and the first ones end one after the other.
    fewer = batch([0, 1] * 4)
    fewer["requests"][:3] = [request for n in range(3) for request in batch([n % 2], max_tokens=3 + n)["requests"]]
    certain = [batch(PREEMPTED), batch(many, at_once=6, **sampled), fewer]

    engine = {
        "model": str(ZOO / "target"),
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "block_size": 32,
        "enable_prefix_caching": False,
    }
    ours = {"model": "qm_spec", "num_speculative_tokens": NUM_DRAFTS}
    by_batch = [[1, 6, NUM_DRAFTS], [7, 7, 2], [8, 8, 0]]
    v2 = INTERPRETED + NOISE + STEPPED
    noted_v2 = v2.replace("#PATCHES", NOTED_V2)
    runs = {
        "drawn": ({"speculative_config": ours}, drawn, noted_v2),
        "certain": (
            {
                "speculative_config": {
                    **ours,
                    "draft_sample_method": "greedy",
                    "num_speculative_tokens_per_batch_size": by_batch,
                },
                "num_gpu_blocks_override": 9,
                "seed": 1,
            },
            certain,
            noted_v2.replace("#PREPARED", PADDED),
        ),
        "plain": ({}, plainly, v2),
        "v1": ({"speculative_config": ours}, drawn[:1], STEPPED.replace("#PATCHES", NOTED_V1)),
    }

    def start(name: str) -> Any:
        settings, batches, program = runs[name]
        return run_offline(tmp_path_factory.mktemp(name), {**engine, **settings}, batches, program)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("QM_SPEC_LOOKUP", "0")
        # The interpreter has one thread.
        patch.setenv("OMP_NUM_THREADS", "1")
        return SimpleNamespace(**dict(zip(runs, pool.map(start, runs), strict=True)))


@pytest.fixture(scope="module")
def pair() -> Any:
    target = AutoModelForCausalLM.from_pretrained(ZOO / "target", dtype=torch.float32).eval()
    return SimpleNamespace(target=target, drafter=load_drafter(ZOO / "drafter").eval())


def read(pair: Any, prompt: list[int], text: list[int]) -> Any:
    return read_text(pair.target, prompt, text, pair.drafter.config.eagle_aux_hidden_state_layer_ids)


@pytest.fixture(scope="module")
def accepted(pair: Any, prompts: list[list[int]], engines: Any) -> list[list[int]]:
    """By prompt, what a step of its greedy text accepts behind 1, 2... tokens."""
    texts = engines.plain["batches"][0]["texts"]
    return [
        accepted_everywhere(pair.drafter, read(pair, prompt, text), NUM_DRAFTS)
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def starts(steps: list[list[int]]) -> list[int]:
    """Return how many tokens there were before each step."""
    return [0, *accumulate(tokens for _, tokens in steps)][:-1]


def expected_steps(steps: list[list[int]], accepted: list[int]) -> list[list[int]]:
    """Return the steps as a replay has them: as far as it goes, and with as many drafts as were verified."""
    expected, num_tokens = [], sum(tokens for _, tokens in steps)
    for (drafts, tokens), written in zip(steps, starts(steps), strict=True):
        if written > len(accepted):
            expected.append([drafts, tokens])
        else:
            kept = min(accepted[written - 1], drafts) if written else 0
            expected.append([drafts, min(kept + 1, num_tokens - written)])
    return expected


def check(batch: Any, numbers: Any, engines: Any, accepted: list[list[int]]) -> None:
    """Assert that greedy texts are those without drafts, and every step is what a replay expects."""
    texts = engines.plain["batches"][0]["texts"]
    for number, text, steps in zip(numbers, batch["texts"], batch["steps"], strict=True):
        assert text == texts[number][: len(text)], f"prompt {number}"
        assert steps == expected_steps(steps, accepted[number]), f"prompt {number}"


def test_twenty_greedy_outputs_are_those_without_drafts_and_those_of_v1(engines: Any) -> None:
    plain = engines.plain["batches"][0]["texts"]
    assert all(len(text) == NUM_TOKENS + NUM_DRAFTS - 1 for text in plain)
    for run in (engines.drawn, engines.v1):
        assert run["batches"][0]["texts"] == [text[:NUM_TOKENS] for text in plain]
    assert engines.drawn["speculators"] == ["QuickMergeSpeculator"]


def test_twenty_prompts_have_the_drafts_of_v1(engines: Any, prompts: list[list[int]]) -> None:
    """Behind each token where either runner drafted, pieces of prompts aside."""

    def behind_prompts(run: Any) -> dict[str, list[int]]:
        drafted = {}
        for place, tokens in run["drafted"].items():
            name, verified = place.split()
            number, request = map(int, name.split("."))
            if number == 0 and int(verified) >= len(prompts[request]):
                drafted[place] = tokens
        return drafted

    ours, theirs = behind_prompts(engines.drawn), behind_prompts(engines.v1)
    # At the end of a text one of them may draft what is verified no more.
    both = ours.keys() & theirs.keys()
    assert len(both) > 0.8 * len(ours.keys() | theirs.keys()) > 80
    assert {place: ours[place] for place in both} == {place: theirs[place] for place in both}


def test_each_step_accepts_what_a_replay_does_and_vllm_counts_it(engines: Any, accepted: list[list[int]]) -> None:
    """Prompts are read in pieces while others decode, too."""
    batch = engines.drawn["batches"][0]
    check(batch, range(len(LENGTHS)), engines, accepted)
    assert batch["mixed"] > 3
    drafts, kept = [], []
    for steps, most in zip(batch["steps"], accepted, strict=True):
        for (num_drafts, _), written in zip(steps, starts(steps), strict=True):
            if num_drafts:
                drafts.append(num_drafts)
                kept.append(min(most[written - 1], num_drafts))
    counters = batch["counters"]
    assert counters["vllm:spec_decode_num_accepted_tokens"] == sum(kept) > len(kept) / 2
    assert counters["vllm:spec_decode_num_drafts"] == len(drafts)
    assert counters["vllm:spec_decode_num_draft_tokens"] == sum(drafts)


@pytest.mark.parametrize(("engine", "place"), [("drawn", 2), ("certain", 1)])
def test_samples_have_the_targets_distribution(
    engines: Any, pair: Any, prompts: list[list[int]], engine: str, place: int
) -> None:
    """Chi-squared test of where in the target's distribution the tokens lie; the drafter's favourites come first there.

    That of a right sample is uniform, whatever was written before and whatever the order. Fails on a right
    implementation for one seed in 1000.
    """
    ranks, chance = [], torch.Generator().manual_seed(0)
    for number, text in enumerate(getattr(engines, engine)["batches"][place]["texts"]):
        prompt = prompts[SHORT[number % len(SHORT)]]
        # Of all tokens but the first, for which nothing is drafted.
        text_read, token_ids = read(pair, prompt, text), torch.tensor(text[1:]).unsqueeze(-1)
        probs = text_read.logits[:-1].double().softmax(-1)
        favour = first_drafts(pair, text_read) / probs
        before = probs.where(favour > favour.gather(1, token_ids), 0.0).sum(-1)
        own = probs.gather(1, token_ids)[:, 0]
        ranks.append(before + torch.rand(len(own), generator=chance) * own)
    assert len(torch.cat(ranks)) == NUM_SAMPLED * (SAMPLED_TOKENS - 1)
    counts = torch.histc(torch.cat(ranks), 10, 0.0, 1.0)
    p_value = chisquare(counts.tolist()).pvalue
    assert p_value > 1e-3, f"p = {p_value:.1e}, {counts.tolist()}"


def test_drawn_drafts_are_accepted_as_often_as_a_replay_expects(
    engines: Any, pair: Any, prompts: list[list[int]]
) -> None:
    """Given the texts, each step's chances are known, so the sum's deviation is; 3.3 of it is one seed in 1000."""
    batch, difference, variance = engines.drawn["batches"][2], 0.0, 0.0
    for number, (text, steps) in enumerate(zip(batch["texts"], batch["steps"], strict=True)):
        prompt = prompts[SHORT[number % len(SHORT)]]
        chances = chances_everywhere(pair.drafter, read(pair, prompt, text), NUM_DRAFTS, 1.0)
        for (drafts, tokens), written in zip(steps, starts(steps), strict=True):
            if written > 0 and written + NUM_DRAFTS < len(text):
                assert drafts == NUM_DRAFTS
                mean = float(chances[written - 1].sum())
                difference += tokens - 1 - mean
                variance += float(chances[written - 1] @ torch.tensor([1.0, 3.0, 5.0, 7.0]).double()) - mean**2
    assert variance > 50
    assert abs(difference) < 3.3 * variance**0.5, f"{difference / variance**0.5:.1f} deviations"


def test_certain_drafts_of_samples_are_accepted_where_a_replay_has_them(
    engines: Any, pair: Any, prompts: list[list[int]]
) -> None:
    batch = engines.certain["batches"][1]
    for number, (text, steps) in enumerate(zip(batch["texts"], batch["steps"], strict=True)):
        text_read = read(pair, prompts[SHORT[number % len(SHORT)]], text)
        accepted = accepted_everywhere(pair.drafter, text_read, NUM_DRAFTS)
        assert steps == expected_steps(steps, accepted), f"sample {number}"
    assert sum(tokens > 1 for steps in batch["steps"] for _, tokens in steps) > 20


def test_preempted_requests_are_computed_anew_and_drafted_for_as_before(
    engines: Any, accepted: list[list[int]]
) -> None:
    batch = engines.certain["batches"][0]
    assert batch["counters"]["vllm:num_preemptions"] > 0
    # What comes of reading all anew is a token without drafts, amid others.
    resumed = [steps for steps in batch["steps"] if any(drafts == 0 for drafts, _ in steps[1:])]
    assert resumed and all(len(text) == NUM_TOKENS for text in batch["texts"])
    check(batch, PREEMPTED, engines, accepted)


def test_fewer_or_no_drafts_with_more_requests_and_padded_rows_change_nothing(
    engines: Any, accepted: list[list[int]]
) -> None:
    batch = engines.certain["batches"][2]
    check(batch, [0, 1] * 4, engines, accepted)
    assert [len(text) for text in batch["texts"]] == [3, 4, 5, *[NUM_TOKENS] * 5]
    drafts = {drafts for steps in batch["steps"] for drafts, _ in steps[1:]}
    assert drafts >= {0, 2, NUM_DRAFTS}
    assert sorted(engines.certain["speculators"]) == ["QuickMergeSpeculator", "padded"]


def test_an_aborted_request_leaves_the_others_and_gives_its_pages_back(engines: Any, accepted: list[list[int]]) -> None:
    batch = engines.drawn["batches"][5]
    check(batch, SHORT[:4], engines, accepted)
    assert [len(text) == NUM_TOKENS for text in batch["texts"]] == [True, False, True, True]
    assert 2 < len(batch["texts"][1]) < NUM_TOKENS
    for run in (engines.drawn, engines.certain):
        assert all(batch["free"][0] == batch["free"][1] > 0 for batch in run["batches"])


def test_structured_outputs_are_those_without_drafts(engines: Any) -> None:
    pytest.importorskip("xgrammar", reason="vLLM's backend for structured outputs is not installed")
    batch = engines.drawn["batches"][1]
    assert batch["texts"] == engines.plain["batches"][1]["texts"]
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "target")
    texts = [tokenizer.decode(text, skip_special_tokens=True) for text in batch["texts"]]
    assert all(re.fullmatch("[a-z ]{12,}", text) for text in texts), texts
    free = [engines.plain["batches"][0]["texts"][number][:NUM_TOKENS] for number in SHAPED]
    assert not any(text in batch["texts"] for text in free)
    assert any(tokens > 1 for steps in batch["steps"] for _, tokens in steps)


def test_a_seeds_sample_is_the_same_alone_and_among_others(engines: Any, accepted: list[list[int]]) -> None:
    alone, together = engines.drawn["batches"][3], engines.drawn["batches"][4]
    greedy, (sample, other) = together["texts"][:2], together["texts"][2:]
    assert sample == alone["texts"][0] and sample != other
    assert together["steps"][2] == alone["steps"][0], "the same drafts are accepted"
    assert greedy == [engines.plain["batches"][0]["texts"][number][:NUM_TOKENS] for number in SHORT[1:3]]
