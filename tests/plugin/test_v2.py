"""vLLM's V2 runner with our speculator: the same drafts as in V1, and decoding stays what it is without."""

from __future__ import annotations

import json
import logging
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.offline_engine import OFFLINE, run_offline
from support.plugin_doubles import SIZES, make_model, make_step
from support.recorded_graph import Recorder, WithoutHost, without_values
from support.v2_engine import V2
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

import qm_spec
from qm_spec.config import ARCHITECTURE
from qm_spec.drafter.cut_off import CutOff
from qm_spec.drafter.suffix_index import SuffixIndex
from qm_spec.integrations.vllm_plugin import speculator as speculator_module
from qm_spec.integrations.vllm_plugin.copies import CopiedDrafts
from qm_spec.integrations.vllm_plugin.counters import DeviceCounts
from qm_spec.integrations.vllm_plugin.patches.v2_speculator import with_speculator
from qm_spec.integrations.vllm_plugin.session import DraftSession
from qm_spec.integrations.vllm_plugin.speculator import QuickMergeSpeculator
from qm_spec.integrations.vllm_plugin.step import DraftStep

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

NUM_DRAFTS = 4
# Of the states of three requests.
PLACES = (5, 0, 3)
BUFFERS = (
    "num_verified",
    "idx_mapping",
    "hidden_states",
    "next_token_ids",
    "current_draft_step",
    "draft_tokens",
    "draft_token_confidence_probs",
)


# On doubles


def manager(mode: CUDAGraphMode, replay: Any = None) -> Any:
    """What a batch of three finds among captured graphs: one for four if any."""
    found = BatchExecutionDescriptor(cg_mode=mode, num_tokens=4, num_reqs=4)
    return SimpleNamespace(
        dispatch=lambda *args, **settings: found,
        specialize_spec_tokens=lambda descriptor, num_drafts: descriptor,
        run_fullgraph=lambda descriptor: replay(),
    )


def make_speculator(model: Any, most_drafts: int = NUM_DRAFTS, lookup_length: int = 0) -> Any:
    """Return ours without the set-up that its constructor asks an engine for; drafts are greedy."""
    model.model.attn.layer_name = "draft"
    model.session = DraftSession(model, None, NUM_DRAFTS, most_drafts, lookup_length=lookup_length)
    speculator = QuickMergeSpeculator.__new__(QuickMergeSpeculator)
    copied = CopiedDrafts(6, most_drafts, torch.device("cpu"))
    settings = {
        "model": model,
        "num_speculative_steps": most_drafts,
        "copied": copied,
        "req_states": SimpleNamespace(all_token_ids=SimpleNamespace(gpu=texts(model))),
        "sure_ids": copied.token_ids[:, NUM_DRAFTS:].clone(),
        "enable_adaptive_verification": most_drafts > NUM_DRAFTS,
        "draft_token_confidence_probs": torch.full((4, most_drafts), 0.25),
        "draft_tokens": torch.full((4, most_drafts), -7),
        "idx_mapping": torch.zeros(4, dtype=torch.int64),
        "temperature": torch.zeros(6),
        "seeds": torch.zeros(6, dtype=torch.int64),
        "current_draft_step": torch.tensor(0),
        "hidden_states": torch.zeros(12, SIZES.hidden),
        "num_verified": torch.full((4,), 99, dtype=torch.int32),
        "next_token_ids": torch.zeros(4, dtype=torch.int64),
        "decode_cudagraph_manager": manager(CUDAGraphMode.NONE),
        "attn_groups": [],
        "draft_logits": None,
        "use_local_argmax_reduction": False,
        "acceptance_estimator": None,
        "cut_off": CutOff(lambda text: None),
        "counts": DeviceCounts(torch.device("cpu")),
        "has_drafted": False,
    }
    for name, value in settings.items():
        setattr(speculator, name, value)
    return speculator


def texts(model: Any) -> torch.Tensor:
    """Return all tokens of the requests by place: request 0 goes round in seven, the others never repeat themselves."""
    token_ids = torch.arange(6).unsqueeze(1) * 1000 + torch.arange(300)
    token_ids[PLACES[0]] = torch.arange(300) % 7
    return token_ids.int()


def run(speculator: Any, step: DraftStep, unpaged: bool = False, **settings: Any) -> torch.Tensor:
    """Draft behind a step as the V2 runner tells it; of request 2 the prompt is being read."""
    places = torch.tensor(PLACES)
    last_sampled, next_prefill = torch.full((6, 1), 11), torch.full((1, 6), 12, dtype=torch.int32)
    last_sampled[places[:2], 0] = step.next_token_ids[:2].long()
    next_prefill[0, places[2]] = step.next_token_ids[2]
    padding = 3
    batch = SimpleNamespace(
        num_reqs=3,
        num_tokens=len(step.token_ids),
        idx_mapping=places,
        query_start_loc=step.query_start_loc,
        seq_lens=step.seq_lens,
        seq_lens_cpu_upper_bound=step.seq_lens,
        input_ids=torch.nn.functional.pad(step.token_ids, (0, padding)),
        num_draft_tokens=4,
        cu_num_logits=torch.tensor([0, 3, 6, 7]),
    )
    slots = torch.nn.functional.pad(step.slot_mapping, (0, padding), value=-1)
    metadata = {"draft": SimpleNamespace(block_table=step.block_table, slot_mapping=slots), "target": None}
    aux = list(torch.nn.functional.pad(step.states, (0, 0, 0, padding)).chunk(3, -1))
    return speculator.propose(
        batch,
        None if unpaged else metadata,
        None,
        None,
        aux,
        torch.tensor([1, 3, 0]),
        step.num_rejected,
        last_sampled,
        next_prefill,
        torch.zeros(6),
        torch.zeros(6, dtype=torch.int64),
        dp_sync_state=None,
        **settings,
    )


@pytest.fixture
def model() -> Any:
    return make_model()


def pages(model: Any) -> torch.Tensor:
    return model.case.cache.nan_to_num(nan=-1.0).clone()


def test_the_same_step_has_the_same_drafts_and_leaves_the_same_pages_in_both_runners(model: Any) -> None:
    before = model.case.cache.clone()
    expected = DraftSession(model, SimpleNamespace(device_config=SimpleNamespace(device_type="cpu")), 4, 4).propose(
        make_step(model, NUM_DRAFTS, None), [NUM_DRAFTS] * 3
    )
    after = pages(model)
    model.case.cache.copy_(before)
    drafts = run(make_speculator(model), make_step(model, NUM_DRAFTS, None))
    assert torch.equal(drafts, expected.token_ids)
    assert torch.equal(pages(model), after) and not torch.equal(after, before.nan_to_num(nan=-1.0))


def test_fewer_drafts_may_be_asked_for_and_none_still_fill_the_pages(model: Any) -> None:
    step, before = make_step(model, NUM_DRAFTS, None), model.case.cache.clone()
    all_four = run(make_speculator(model), step).clone()
    for num_drafts in (2, 0):
        model.case.cache.copy_(before)
        drafts = run(make_speculator(model), step, num_speculative_tokens=num_drafts)
        assert drafts.shape == all_four.shape and torch.equal(drafts[:, :num_drafts], all_four[:, :num_drafts])
        assert (drafts[:, num_drafts:] == -7).all()
        assert not torch.equal(pages(model), before.nan_to_num(nan=-1.0))


def test_a_graph_of_a_larger_batch_drafts_the_same_and_touches_nothing_in_its_padding(model: Any) -> None:
    """The graph's double has no host: what the loop had read there would stay as it was when it was recorded."""
    step, before = make_step(model, NUM_DRAFTS, None), model.case.cache.clone()
    speculator = make_speculator(model)
    eager = run(speculator, step).clone()
    after = pages(model)
    # The row behind the batch names pages of the others.
    table = torch.cat([step.block_table, step.block_table[:1]])
    metadata = {"draft": SimpleNamespace(block_table=table)}
    speculator.num_verified.zero_()
    replay = Recorder()(lambda: speculator._draft_all(4, 4, metadata, None, None, CUDAGraphMode.NONE, NUM_DRAFTS))
    model.case.cache.copy_(before)
    speculator.num_verified.fill_(99)
    speculator.draft_tokens.fill_(-7)
    speculator.decode_cudagraph_manager = manager(CUDAGraphMode.FULL, replay)
    assert torch.equal(run(speculator, step), eager)
    assert torch.equal(pages(model), after)


def test_a_graph_drafts_what_lookup_finds_at_each_replay(model: Any) -> None:
    step, before = make_step(model, NUM_DRAFTS, None), model.case.cache.clone()
    speculator = make_speculator(model, lookup_length=2)
    eager = run(speculator, step).clone()
    metadata = {"draft": SimpleNamespace(block_table=step.block_table)}
    replay = Recorder()(lambda: speculator._draft_all(3, 3, metadata, None, None, CUDAGraphMode.NONE, NUM_DRAFTS))
    speculator.decode_cudagraph_manager = manager(CUDAGraphMode.FULL, replay)
    all_token_ids = speculator.req_states.all_token_ids.gpu
    copied = all_token_ids.clone()
    for repeats in (False, True):
        all_token_ids[PLACES[0]] = copied[PLACES[0]] if repeats else torch.arange(300, dtype=torch.int32)
        model.case.cache.copy_(before)
        drafts = run(speculator, step)
        assert torch.equal(drafts, eager) == repeats and torch.equal(drafts[1:], eager[1:])


@pytest.mark.parametrize(("replays", "mode"), [(True, "FULL_DECODE_ONLY"), (False, "NONE")])
def test_the_loop_is_captured_where_the_operators_hold_in_a_graph(
    replays: bool, mode: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculator_module, "can_capture", lambda vllm_config: replays)
    monkeypatch.setattr(
        speculator_module, "SpeculatorCudaGraphManager", lambda config, device, mode, decode_query_len: mode.name
    )
    speculator = make_speculator(model)
    speculator.vllm_config, speculator.device = None, torch.device("cpu")
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
    assert speculator.decode_cudagraph_manager == mode and model.session.captures is replays


def test_the_loop_reads_no_value_on_the_host(model: Any) -> None:
    """So that it can be captured; positions of pages are values too."""
    model.case.cache.nan_to_num_()
    speculator = make_speculator(model, 6, lookup_length=2)
    inner, step = model.model, make_step(model, NUM_DRAFTS, None)
    inner.layer.to("meta")
    cache, embedding, table, *buffers = without_values(
        inner.attn.kv_cache,
        inner.embed_tokens.weight,
        step.block_table,
        *(getattr(speculator, name) for name in BUFFERS),
    )
    for name, buffer in zip(BUFFERS, buffers, strict=True):
        setattr(speculator, name, buffer)
    copied = speculator.copied
    copied.token_ids, copied.lengths = without_values(copied.token_ids, copied.lengths)
    inner.attn.kv_cache, inner.embed_tokens = cache, lambda ids: torch.nn.functional.embedding(ids, embedding)
    model.compute_logits = lambda hidden: hidden @ embedding.T
    with WithoutHost():
        metadata = {"draft": SimpleNamespace(block_table=table)}
        speculator._draft_all(3, 3, metadata, None, None, CUDAGraphMode.NONE, 6)


def test_a_dummy_batch_touches_no_page(model: Any) -> None:
    """Such as vLLM's warm-up, and idle ranks: rows without slots, whose tables name real pages."""
    step, before = make_step(model, NUM_DRAFTS, None), pages(model)
    step.slot_mapping.fill_(-1)
    speculator = make_speculator(model)
    assert run(speculator, step, dummy_run=True).shape == (3, NUM_DRAFTS)
    assert run(speculator, step, dummy_run=True, unpaged=True).shape == (3, NUM_DRAFTS)
    assert torch.equal(pages(model), before) and model.session.num_failures == 0
    # Before there are pages.
    model.model.attn.kv_cache = torch.tensor([])
    assert run(speculator, step, dummy_run=True, unpaged=True, is_profile=True).shape == (3, NUM_DRAFTS)
    assert model.session.num_failures == 0


def test_drafts_are_drawn_by_vllm_for_the_position_before_them(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def sample(self: Any, output: Any, positions: Any, places: Any, *rest: Any) -> torch.Tensor:
        asked.append((positions.tolist(), places.tolist(), int(rest[2])))
        return torch.tensor([7, 8, 9])

    monkeypatch.setattr(DraftModelSpeculator, "sample_draft", sample)
    step = make_step(model, NUM_DRAFTS, None)
    assert run(make_speculator(model), step).tolist() == [[7] * 4, [8] * 4, [9] * 4]
    verified = step.num_verified
    assert asked == [((verified + number).tolist(), [5, 0, 3], number) for number in range(NUM_DRAFTS)]


def test_a_speculator_that_fails_drafts_sure_zeros(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Verification must not take them for draws from the distributions of earlier steps."""
    speculator = make_speculator(model)
    step, cache = make_step(model, NUM_DRAFTS, None), model.case.cache.clone()
    drafts = run(speculator, step).clone()
    speculator.draft_logits = torch.zeros(6, NUM_DRAFTS, SIZES.vocabulary)
    model.session.read = None
    for _ in range(2):
        speculator.draft_tokens.fill_(3)
        assert (run(speculator, step) == 0).all()
    records = [record for record in caplog.records if "this step goes on without drafts" in record.message]
    assert len(records) == 2 and all(record.exc_info for record in records)
    probs = speculator.draft_logits.softmax(-1)
    assert (probs[[5, 0, 3], :, 0] == 1).all()
    assert (probs[[1, 2, 4], :, 0] < 1).all(), "drafts of requests that were not in the batch keep theirs"
    del model.session.read
    speculator.draft_logits = None
    model.case.cache.copy_(cache)
    assert torch.equal(run(speculator, step), drafts), "the step after drafts again"


def test_what_a_speculator_draws_from_is_finite_whatever_the_pages_hold(model: Any) -> None:
    """Verification would weigh drafts by it, and may not write other tokens than the target's."""
    seen = []
    model.compute_logits = lambda hidden: seen.append(hidden.clone()) or hidden @ model.lm_head.weight[:200].T
    step = make_step(model, NUM_DRAFTS, None)
    step.states[0] = float("nan")
    assert run(make_speculator(model), step).shape == (3, NUM_DRAFTS)
    assert len(seen) == NUM_DRAFTS and all(hidden.isfinite().all() for hidden in seen)


# Lookup


def next_of_seven(step: DraftStep, number: int) -> list[int]:
    """Return what follows request 0's tokens."""
    newest = int(step.num_verified[0]) % 7
    return [(newest + 1 + place) % 7 for place in range(number)]


def test_what_followed_the_newest_tokens_before_is_drafted(model: Any) -> None:
    step, before = make_step(model, NUM_DRAFTS, None), model.case.cache.clone()
    by_prior = run(make_speculator(model), step).clone()
    model.case.cache.copy_(before)
    speculator = make_speculator(model, lookup_length=2)
    drafts = run(speculator, step)
    assert drafts[0].tolist() == next_of_seven(step, NUM_DRAFTS) != by_prior[0].tolist()
    assert torch.equal(drafts[1:], by_prior[1:])
    # A batch without requests looks at no text.
    speculator.req_states.all_token_ids.gpu = None
    assert model.session.num_failures == 0
    model.case.cache.copy_(before)
    run(speculator, step, dummy_run=True, unpaged=True)
    assert model.session.num_failures == 0 and (speculator.copied.lengths == 0).all()


@pytest.mark.parametrize("local_argmax", [False, True])
def test_a_copy_is_sure_to_verification_and_in_every_way_to_choose_drafts(
    local_argmax: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.gpu.spec_decode import speculator as vllms

    def draw(logits: Any, places: Any, *rest: Any, logits_cache: Any, logits_cache_col: Any, **settings: Any) -> Any:
        logits_cache[places, logits_cache_col] = logits
        return logits.argmax(-1)

    monkeypatch.setattr(vllms, "gumbel_sample", draw)
    model.get_top_tokens = lambda hidden: model.compute_logits(hidden).argmax(-1)
    speculator, step = make_speculator(model, lookup_length=2), make_step(model, NUM_DRAFTS, None)
    speculator.use_local_argmax_reduction = local_argmax
    speculator.draft_logits = None if local_argmax else torch.zeros(6, NUM_DRAFTS, SIZES.vocabulary)
    speculator.draft_watermarker, speculator.use_fp64_gumbel = None, False
    copied = run(speculator, step)[0]
    assert copied.tolist() == next_of_seven(step, NUM_DRAFTS)
    if not local_argmax:
        probs = speculator.draft_logits.softmax(-1)
        assert (probs[PLACES[0]].gather(1, copied.unsqueeze(1)) == 1).all()
        assert (probs[PLACES[1]].amax(-1) < 1).all()


def test_where_verification_chooses_copies_go_further_than_the_prior(model: Any) -> None:
    from vllm.v1.worker.gpu.spec_decode.adaptive_verification import _assign_draft_token_budget

    most = 12
    speculator, step = make_speculator(model, most, lookup_length=2), make_step(model, NUM_DRAFTS, None)
    speculator.draft_logits = None
    drafts = run(speculator, step)
    assert drafts[0].tolist() == next_of_seven(step, most)
    assert (drafts[1:, :NUM_DRAFTS] != 0).any() and (drafts[1:, NUM_DRAFTS:] == 0).all()
    confidences = torch.zeros(6, most)
    confidences[list(PLACES)] = speculator.draft_token_confidence_probs[:3]
    # Eight tokens match, and of the prior's drafts what vLLM had estimated stays.
    assert confidences[PLACES[0]].tolist() == pytest.approx([8 / 9] * most)
    assert confidences[PLACES[1]].tolist() == [0.25] * NUM_DRAFTS + [0.0] * (most - NUM_DRAFTS)
    admitted = torch.full((3,), most, dtype=torch.int32)
    _assign_draft_token_budget(confidences, torch.tensor(PLACES), admitted, most + 2, most)
    assert admitted.tolist() == [most, 1, 1]


def test_drafts_behind_the_priors_are_sure_whatever_they_are(model: Any) -> None:
    """Also when another one is copied there, and when nothing is any more."""
    most = 8
    speculator, step = make_speculator(model, most, lookup_length=2), make_step(model, NUM_DRAFTS, None)
    speculator.draft_logits = torch.zeros(6, most, SIZES.vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftModelSpeculator, "load_model", lambda self, target: None)
        speculator.supports_mm_inputs = False
        speculator.load_model(None)
        patch.setattr(DraftModelSpeculator, "sample_draft", lambda self, output, *rest: output.new_zeros(3).long())
        all_token_ids = speculator.req_states.all_token_ids.gpu
        for shift in (0, 3, None):
            row = torch.arange(300) if shift is None else (torch.arange(300) + shift) % 7
            all_token_ids[PLACES[0]] = row
            drafts = run(speculator, step)
            assert (drafts[0, NUM_DRAFTS:] == 0).all() == (shift is None)
            sure = speculator.draft_logits[list(PLACES), NUM_DRAFTS:].softmax(-1)
            assert (sure.gather(2, drafts[:, NUM_DRAFTS:].unsqueeze(2)) == 1).all()
    assert model.session.num_failures == 0


def test_an_estimate_of_the_priors_acceptance_learns_nothing_from_copies(model: Any) -> None:
    seen: list[tuple[list[int], list[int]]] = []
    speculator, step = make_speculator(model, lookup_length=2), make_step(model, NUM_DRAFTS, None)
    run(speculator, step)
    estimator = SimpleNamespace(
        step=lambda places, sampled, rejected: seen.append((sampled.tolist(), rejected.tolist()))
    )
    speculator.acceptance_estimator = estimator
    speculator.observe_verification(torch.tensor([3, 5, 0]), torch.tensor([2, 5, 1]), torch.tensor([3, 0, 4]))
    assert seen == [([2, 0, 1], [3, 0, 4])]


@pytest.mark.parametrize(("most", "moved"), [(6 * 300 * 4, True), (6 * 300 * 4 - 1, False)])
def test_all_tokens_are_on_the_device_where_they_fit(most: int, moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculator_module, "_MOST_TOKEN_BYTES", most)
    # The real one asks for memory that is pinned.
    monkeypatch.setattr(speculator_module, "StagedWriteTensor", lambda size, dtype, device: (size, dtype, device))
    states = SimpleNamespace(max_num_reqs=6, max_model_len=300, device=torch.device("cpu"), all_token_ids="host")
    speculator_module.keep_tokens_on_device(states)
    assert states.all_token_ids == (((6, 300), torch.int32, states.device) if moved else "host")


def test_an_engine_that_is_off_drafts_sure_zeros_and_still_fills_the_pages(model: Any) -> None:
    """As vLLM takes no fewer than K; so the loop costs nothing, and drafts are as good as ever afterwards."""
    step, before = make_step(model, NUM_DRAFTS, None), model.case.cache.clone()
    expected = run(make_speculator(model), step).clone()
    model.case.cache.copy_(before)
    speculator = make_speculator(model)
    speculator.draft_logits = torch.zeros(6, NUM_DRAFTS, SIZES.vocabulary)
    model.session.turn(False)
    assert (run(speculator, step) == 0).all() and (speculator.draft_logits[5].softmax(-1)[:, 0] == 1).all()
    assert not torch.equal(pages(model), before.nan_to_num(nan=-1.0))
    model.session.turn(True)
    speculator.draft_logits = None
    assert torch.equal(run(speculator, step), expected)
    assert model.session.counters.by_name()["steps"] == {"plain": 1, "prior": 1, "lookup": 0}
    assert model.session.counters.by_name()["failed_steps"] == 0


def test_where_drafts_do_not_pay_zeros_are_drafted_and_vllms_estimate_learns_nothing_of_them(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their chance is 0, so vLLM's adaptive verification verifies none of them."""
    seen: list[Any] = []
    speculator, step = make_speculator(model), make_step(model, NUM_DRAFTS, None)
    estimator = SimpleNamespace(step=lambda *verdict: seen.append(verdict))
    speculator.acceptance_estimator = estimator
    speculator.draft_logits = torch.zeros(6, NUM_DRAFTS, SIZES.vocabulary)
    told: list[tuple[int, float | None]] = []
    monkeypatch.setattr(speculator_module, "expected_gain", lambda states, batch: 0.5)
    speculator.cut_off = SimpleNamespace(drafts=lambda *what: told.append(what))
    drafts = run(speculator, step)
    assert (drafts == 0).all() and (speculator.draft_token_confidence_probs == 0).all() and told == [(3, 0.5)]
    assert (speculator.draft_logits[list(PLACES)].softmax(-1)[..., 0] == 1).all()
    verdict = torch.tensor([3, 5, 0]), torch.tensor([1, 1, 1]), torch.tensor([4, 4, 4])
    speculator.observe_verification(*verdict)
    assert not seen and model.session.counters.by_name()["steps"]["plain"] == 1
    speculator.cut_off, speculator.draft_logits = SimpleNamespace(drafts=lambda *what: True), None
    speculator.acceptance_estimator = None
    assert (run(speculator, step) != 0).any()
    speculator.acceptance_estimator = estimator
    speculator.observe_verification(*verdict)
    assert len(seen) == 1


def test_verified_drafts_are_counted_without_the_host(model: Any) -> None:
    """Of three requests two had two drafts each, of which two were rejected; dummy batches count nothing."""
    speculator, step = make_speculator(model), make_step(model, NUM_DRAFTS, None)
    step.num_rejected[:] = torch.tensor([2, 0, 0])
    run(speculator, step, dummy_run=True)
    # The first step verifies drafts of nobody's, the third has counted the second.
    for _ in range(3):
        run(speculator, step)
    counted = model.session.counters.by_name()
    assert counted["drafts"] == {"prior": 2, "lookup": 0} and counted["draft_tokens"]["prior"] == 4
    assert counted["accepted_tokens"]["prior"] == 2 and counted["steps"]["prior"] == 3
    model.session.turn(False)
    for _ in range(4):
        run(speculator, step)
    assert model.session.counters.by_name()["drafts"]["prior"] == 6, "zeros are no drafts of ours"


@pytest.mark.parametrize(("architectures", "ours"), [([ARCHITECTURE], True), (["Eagle3LlamaForCausalLM"], False)])
def test_ours_is_taken_for_our_model_only(
    architectures: list[str], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuickMergeSpeculator, "__init__", lambda self, vllm_config, device, req_states: None)
    drafter = SimpleNamespace(architectures=architectures)
    for model_config, expected in ((drafter, ours), (None, False)):
        config: Any = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=model_config))
        speculator = with_speculator(lambda *args: "vLLM's")(config, None, None)
        assert (speculator == "vLLM's") != expected
        assert isinstance(speculator, QuickMergeSpeculator) == expected


# Engines on the shipped pair

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
NUM_TOKENS = 12
ENGINE = {
    "model": str(ZOO / "target"),
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "enable_prefix_caching": True,
}
OURS = {"model": "qm_spec", "num_speculative_tokens": NUM_DRAFTS}
# Tokens of the prompts, of which the engine reads 64 in a step.
LENGTHS = (8, 40, 150)
# Notes what each step drafts for whom, in either runner; which class drafts in V2; and of what a step reads of vLLM the
# names that did not hold what they should.
NOTED = """
import torch
from qm_spec.integrations.vllm_plugin.session import DraftSession
drafted, speculators, broken, seen = [], set(), set(), set()
draft_v1 = DraftSession.draft


def note(model, step, token_ids):
    check(model, step)
    rows = zip(step.num_verified.tolist(), step.next_token_ids.tolist(), token_ids, strict=True)
    drafted.append([[*row] for row in rows])


def check(model, step):
    num_rows, rows = len(step.token_ids), step.query_start_loc.diff()
    batch, first = len(rows), step.seq_lens - rows
    page_size, starts = model.model.attn.kv_cache.shape[2], step.query_start_loc.tolist()
    slots = []
    for row in range(batch):
        place = torch.arange(first[row], step.seq_lens[row])
        slots.append(step.block_table[row].long()[place // page_size] * page_size + place % page_size)
    holds = {
        "num_drafts": step.num_drafts == 4,
        "token_ids": ((step.token_ids >= 0) & (step.token_ids < model.config.vocab_size)).all(),
        "states": step.states.shape == (num_rows, 3 * model.config.hidden_size) and step.states.isfinite().all(),
        "next_token_ids": step.next_token_ids.shape == (batch,),
        "last_rows": torch.equal(step.last_rows.long(), (step.query_start_loc[1:] - 1 - step.num_rejected).long()),
        "query_start_loc": starts[0] == 0 and starts[-1] == num_rows and (rows > 0).all(),
        "seq_lens": step.seq_lens.shape == (batch,) and (first >= 0).all(),
        "num_rejected": ((step.num_rejected >= 0) & (step.num_rejected < rows)).all(),
        "block_table": step.block_table.dtype == torch.int32 and len(step.block_table) == batch,
        "slot_mapping": torch.equal(step.slot_mapping[:num_rows], torch.cat(slots)),
        "temperature": not step.draws or step.temperature.tolist() == [1.0] * batch,
        "generators": not step.draws or [*step.generators] == [*range(batch)],
    }
    if step.draws:
        seen.add("draws")
    for row, request in enumerate(step.requests):
        seen.add("requests")
        start, end, verified = starts[row], starts[row + 1] - int(step.num_rejected[row]), int(step.num_verified[row])
        read = [*step.token_ids[start:end].tolist(), int(step.next_token_ids[row])]
        holds[f"requests of row {row}"] = request.token_ids(int(first[row]), verified + 1) == read
        written = verified + 1 - len(request.state.prompt_token_ids)
        useful = max(11 - written, 0) if written > 0 else 0
        holds[f"num_useful of row {row}"] = request.num_useful(verified) == useful
        answer = request.token_ids(verified + 1 - written, verified + 1) if written > 0 else []
        holds[f"answer of row {row}"] = request.answer == answer
        holds[f"extra arguments of row {row}"] = request.asked is None and request.shares is None
        holds[f"adapter of row {row}"] = request.adapter == 0
    broken.update(name for name, whether in holds.items() if not whether)


def noted_v1(self, step):
    drafts = draft_v1(self, step)
    note(self.model, step, drafts.token_ids.tolist())
    return drafts


DraftSession.draft = noted_v1
"""
NOTED_V2 = """
from qm_spec.integrations.vllm_plugin.speculator import QuickMergeSpeculator
remember_v2, draft_v2, steps = QuickMergeSpeculator._remember, QuickMergeSpeculator._draft, []


def noted_remember(self, step, num_reqs, dummy_run):
    steps[:] = [] if dummy_run else [step]
    remember_v2(self, step, num_reqs, dummy_run)


def noted_v2(self, num_reqs, *args):
    draft_v2(self, num_reqs, *args)
    speculators.add(type(self).__name__)
    for step in steps:
        note(self.model, step, self.draft_tokens[:num_reqs].tolist())


QuickMergeSpeculator._remember, QuickMergeSpeculator._draft = noted_remember, noted_v2
"""
# In a request that says so drafting fails before it writes the last two pieces of the prompt, and once more later.
FAILING = """
from qm_spec.integrations.vllm_plugin.session import DraftSession
read, written, failures = DraftSession.read, [], []


def failing(self, step, cache):
    if globals().get("request", {}).get("fails") and (step.slot_mapping >= 0).any():
        written.append(len(step.states))
        if len(written) in (2, 3, 6):
            failures.append(len(written))
            raise IndexError("page 17")
    return read(self, step, cache)


DraftSession.read = failing
"""
WITH_NOTES = """
result = json.load(open(sys.argv[2]))
notes = {"drafted": drafted, "speculators": [*speculators], "broken": sorted(broken), "seen": sorted(seen)}
notes["failures"] = len(failures)
json.dump({**result, **notes}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def requests() -> list[dict[str, Any]]:
    """Two prompts that repeat themselves, three that do not, and the last once more: each alone; together; sampled.

    Last, the longest one again, for which drafting fails now and then.
    The first goes round and the second repeats a little, as what the target writes by itself does.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ZOO / "target")
    texts = [json.loads(line)["text"] for line in (ZOO / "prompts.jsonl").read_text().splitlines()]
    ids = [tokenizer(text)["input_ids"][:length] for text, length in zip(texts, LENGTHS, strict=False)]
    target = AutoModelForCausalLM.from_pretrained(ZOO / "target", dtype=torch.float32)
    begun = torch.tensor(ids[:1])
    written = target.generate(begun, max_length=97, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    prompts = [{"prompt_token_ids": one} for one in ids]
    repetitive = [{"prompt_token_ids": one} for one in (written, written[:56])]
    greedy = {"temperature": 0, "max_tokens": NUM_TOKENS}
    sampled = {"temperature": 1, "max_tokens": NUM_TOKENS, "seed": 5}
    together = [[{**one, "cache_salt": "together"} for one in many] for many in (prompts, [*repetitive, prompts[1]])]
    return [
        *({"prompts": [prompt], "sampling": greedy} for prompt in [*repetitive, *prompts, prompts[-1]]),
        *({"prompts": many, "sampling": greedy} for many in together),
        *[{"prompts": prompts[:1], "sampling": sampled}] * 2,
        *[{"prompts": repetitive[:1], "sampling": sampled}] * 2,
        {"prompts": [{**prompts[-1], "cache_salt": "failing"}], "sampling": greedy, "fails": True},
    ]


@pytest.fixture(scope="module")
def runs(requests: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The requests with lookup: in V2 without and with our drafter, and in V1 with it; adaptation is off."""
    v1 = NOTED + FAILING + OFFLINE + WITH_NOTES
    v2 = V2.replace("import json, sys\n", NOTED + NOTED_V2 + FAILING + "import json, sys\n") + WITH_NOTES
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QM_SPEC_LOOKUP", "2")
        return SimpleNamespace(
            plain=run_offline(tmp_path_factory.mktemp("plain"), ENGINE, requests, V2),
            v2=run_offline(tmp_path_factory.mktemp("v2"), {**ENGINE, "speculative_config": OURS}, requests, v2),
            v1=run_offline(tmp_path_factory.mktemp("v1"), {**ENGINE, "speculative_config": OURS}, requests, v1),
        )


def alone(run: Any) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return `[verified tokens, newest, drafts]` of steps with one request: of the repetitive ones, of the others."""
    rows = [rows[0] for rows in takewhile(lambda rows: len(rows) == 1, run["drafted"])]
    end = [verified for verified, *_ in rows].index(LENGTHS[0])
    return rows[:end], rows[end:]


def accepted(run: Any, requests: slice) -> int:
    """Return how many draft tokens were accepted in these requests."""
    counts = [0, *(counters["vllm:spec_decode_num_accepted_tokens"] for counters in run["counters"])]
    return counts[requests.stop] - counts[requests.start]


def test_greedy_outputs_are_those_without_drafts_and_those_of_v1(runs: Any) -> None:
    assert runs.v2["speculators"] == ["QuickMergeSpeculator"] and runs.v2["errors"] == [None] * len(runs.v2["errors"])
    assert runs.v2["answers"][:8] == runs.plain["answers"][:8] == runs.v1["answers"][:8]
    assert all(len(ids) == NUM_TOKENS for answers in runs.v2["answers"] for ids in answers)
    assert accepted(runs.v2, slice(2, 7)) > 20, "drafts are kept, so that the texts show something"


def test_requests_alone_have_the_drafts_of_v1(runs: Any) -> None:
    """Also behind pieces of a prompt, and where a prompt's first pages are kept from the request before."""
    _, ours = alone(runs.v2)
    assert ours == alone(runs.v1)[1]
    # The last prompt's first pieces are read the first time only.
    assert [verified for verified, *_ in ours].count(64) == 1
    assert [verified for verified, *_ in ours].count(150) == 2


def test_repetitive_prompts_are_copied_with_the_drafts_of_v1(runs: Any, requests: list[dict[str, Any]]) -> None:
    """Those of the prior, where nothing matches, too."""
    ours, _ = alone(runs.v2)
    assert ours == alone(runs.v1)[0]
    first, second = (
        [*request["prompts"][0]["prompt_token_ids"], *answers[0]]
        for request, answers in zip(requests[:2], runs.plain["answers"][:2], strict=True)
    )
    assert second == first[: len(second)], "so that one text says what was written behind either prompt"
    copied = drafted = 0
    # A text's last step may write more than was asked for.
    for verified, newest, drafts in (step for step in ours if step[0] < len(first)):
        assert first[verified] == newest
        index = SuffixIndex(2)
        index.read(first[:verified])
        lookup = index.look_up(newest, NUM_DRAFTS)
        drafted += 1
        copied += lookup.length > 0
        assert not lookup.length or tuple(drafts) == lookup.drafts
    assert 5 <= copied < drafted, "the prior drafts too"
    assert accepted(runs.v2, slice(0, 1)) >= 9, "of the first prompt's twelve tokens nine or more were drafted"


@pytest.mark.parametrize("samples", [slice(8, 10), slice(10, 12)], ids=["drawn", "copied"])
def test_seeds_reproduce_samples(samples: slice, runs: Any) -> None:
    answers = runs.v2["answers"]
    first, second = answers[samples]
    assert first == second
    assert answers[8] != answers[2], "they were sampled"
    assert accepted(runs.v2, samples) > 0


def test_what_a_step_reads_of_vllm_is_what_it_is_taken_for(runs: Any) -> None:
    """In both live runners: after a change of vLLM's the names that do not fit are listed here."""
    assert runs.v1["broken"] == runs.v2["broken"] == []
    assert runs.v1["seen"] == ["draws", "requests"] and runs.v2["seen"] == []


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_steps_whose_drafting_fails_change_no_token_and_later_ones_draft(runner: str, runs: Any) -> None:
    """Though the pages lack what those steps did not write."""
    run = getattr(runs, runner)
    assert run["failures"] == 3 and run["answers"][12] == runs.plain["answers"][4]
    assert accepted(run, slice(12, 13)) > 0


def test_where_vllm_does_not_tell_the_requests_there_is_no_lookup(
    model: Any, plugin_log: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    speculator, step = make_speculator(model, lookup_length=2), make_step(model, NUM_DRAFTS, None)
    speculator.req_states, speculator.supports_mm_inputs = None, False
    monkeypatch.setattr(DraftModelSpeculator, "load_model", lambda self, target: None)
    speculator.load_model(None)
    run(speculator, step)
    assert model.session.num_failures == 0
    (record,) = plugin_log
    assert "no lookup" in record.getMessage()
