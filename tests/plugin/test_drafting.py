"""The plug-in's choice between one operator and vLLM's layers, and that both draft the same."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.plugin_doubles import MERGE, SIZES, bare, make_model, make_step
from support.recorded_graph import Recorder, WithoutHost, without_values
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.vocab_parallel_embedding import (
    VocabParallelEmbedding,
)
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder

from qm_spec.config import MergeConfig
from qm_spec.drafter.loops.graphs import DraftGraphs
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.drafter.suffix_index import Lookup
from qm_spec.drafter.vocabulary import to_offsets
from qm_spec.integrations.vllm_plugin import attention, cuda_graphs, seeds
from qm_spec.integrations.vllm_plugin import proposer as plugin
from qm_spec.integrations.vllm_plugin import session as drafting
from qm_spec.integrations.vllm_plugin.attention import QuickMergeImpl, QuickMergeMetadata, QuickMergeMetadataBuilder
from qm_spec.integrations.vllm_plugin.model import QuickMergeForCausalLM
from qm_spec.integrations.vllm_plugin.patches import draft_loop
from qm_spec.integrations.vllm_plugin.patches.drafts_after_step import with_pending_drafts
from qm_spec.integrations.vllm_plugin.patches.v2_speculator import SPECULATOR
from qm_spec.integrations.vllm_plugin.session import Drafts, DraftSession, plain_weights
from qm_spec.integrations.vllm_plugin.step import DraftStep
from qm_spec.integrations.vllm_plugin.target_head import DraftRows
from qm_spec.ops.draft_tokens import draft_tokens
from qm_spec.ops.page import slot_elements, split_page

pytestmark = pytest.mark.vllm


@pytest.fixture
def model() -> Any:
    """A drafter whose target has plain weights."""
    return make_model()


TOKEN_IDS = torch.arange(3, 200, 5)


@pytest.fixture
def reduced(model) -> Any:
    """The same with a draft vocabulary."""
    model.draft_rows = DraftRows(len(TOKEN_IDS), SIZES.vocabulary, SIZES.hidden)
    model.draft_rows.token_ids.weight_loader(model.draft_rows.token_ids, to_offsets(TOKEN_IDS))
    model.compute_logits = partial(QuickMergeForCausalLM.compute_logits, model)
    return model


def test_plain_weights_are_taken_without_their_padding(model):
    weights = plain_weights(model)
    assert weights is not None
    assert weights.head.shape == weights.embedding.shape == (SIZES.vocabulary, SIZES.hidden)
    assert weights.head.data_ptr() == model.lm_head.weight.data_ptr(), "not copied"
    assert weights.q_proj is model.model.layer.q_proj.weight and weights.norm is model.model.layer.norm.weight


def test_of_a_draft_vocabulary_its_rows_are_gathered_once_and_again_from_another_head(reduced):
    head = reduced.lm_head.weight
    weights = plain_weights(reduced)
    assert torch.equal(weights.head, head[TOKEN_IDS]) and torch.equal(weights.token_ids, TOKEN_IDS)
    reduced.draft_rows.weight.zero_()
    assert not plain_weights(reduced).head.any(), "gathered anew at every step"
    reduced.lm_head.weight = 2 * head
    assert torch.equal(plain_weights(reduced).head, 2 * head[TOKEN_IDS])
    assert weights.head.data_ptr() == plain_weights(reduced).head.data_ptr(), "a graph's weights have moved"


def test_the_kernel_drafts_with_half_the_bytes_of_the_head_that_is_in_place(reduced, monkeypatch):
    with torch.no_grad():
        reduced.lm_head.weight = reduced.lm_head.weight.bfloat16().float()
    session = DraftSession(reduced, vllm_config("cpu"), 4, 4)
    monkeypatch.setattr(plugin.backend, "backend", lambda device: "compiled")
    own = session._weights()
    halved = own.drafting.head
    assert halved.dtype == torch.bfloat16 and torch.equal(halved.float(), plain_weights(reduced).head)
    assert own.reading.embedding is own.drafting.embedding
    assert session._weights() is own, "made anew at every step"
    reduced.lm_head.weight = 2 * reduced.lm_head.weight
    assert torch.equal(session._weights().drafting.head, 2 * halved), "the head of before"
    monkeypatch.setattr(plugin.backend, "backend", lambda device: "reference")
    session = DraftSession(reduced, vllm_config("cpu"), 4, 4)
    assert session._weights().drafting.head.dtype == torch.float32, "widened again at every step"


@pytest.mark.parametrize(
    ("offsets", "error"),
    [
        (to_offsets(TOKEN_IDS)[1:], "another number"),
        (torch.zeros(len(TOKEN_IDS), dtype=torch.int64) - 1, r"0\.\.199.*in -1\.\.38"),
        (to_offsets(TOKEN_IDS) + 5, r"in 8\.\.203"),
        (-2 * torch.arange(len(TOKEN_IDS)), "must rise"),
    ],
)
def test_a_draft_vocabulary_that_makes_no_sense_is_not_loaded(reduced, offsets, error):
    parameter = reduced.draft_rows.token_ids
    with pytest.raises((ValueError, RuntimeError), match=error):
        parameter.weight_loader(parameter, offsets)


class LoRAEmbedding(VocabParallelEmbedding):
    """Stands for any class that computes more than the product."""


def quantised(model: Any) -> None:
    model.lm_head.quant_method = object()


def wrapped(model: Any) -> None:
    model.model.embed_tokens.__class__ = LoRAEmbedding


def capped(model: Any) -> None:
    model.logits_processor.soft_cap = 30.0


def scaled(model: Any) -> None:
    model.logits_processor.scale = 0.5


def head_of_another_type(model: Any) -> None:
    model.logits_processor.head_dtype = torch.float64


def weight_of_another_type(model: Any) -> None:
    model.lm_head.weight = model.lm_head.weight.half()


def weight_packed_away(model: Any) -> None:
    model.lm_head.weight = torch.empty(0)


@pytest.mark.parametrize(
    "change",
    [quantised, wrapped, capped, scaled, head_of_another_type, weight_of_another_type, weight_packed_away],
    ids=lambda change: change.__name__,
)
def test_vllms_layers_draft_for_a_target_with_more_than_plain_weights(model, change: Callable[[Any], None]):
    change(model)
    assert plain_weights(model) is None


def test_large_batches_of_16_bit_weights_are_left_to_the_library(model, monkeypatch):
    model.case.cache = model.model.attn.kv_cache = model.case.cache.new_zeros(
        *model.case.cache.shape[:-1], slot_elements(SIZES.head_dim, torch.bfloat16), dtype=torch.bfloat16
    )
    model.model.layer.bfloat16()
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight = module.weight.bfloat16()
    model.model.embed_tokens.forward = lambda ids: model.model.embed_tokens.weight[ids]
    model.compute_logits = lambda hidden: hidden @ model.lm_head.weight[: SIZES.vocabulary].T
    model.logits_processor.head_dtype = None
    calls = []
    monkeypatch.setattr(drafting, "draft_tokens", lambda *args: calls.append(args) or draft_tokens(*args))
    for most, by_operator in ((3, 1), (2, 1)):
        monkeypatch.setattr(drafting, "MOST_REQUESTS_16_BIT", most)
        propose(model, 2, None)
        assert len(calls) == by_operator


def propose(
    model: Any,
    num_drafts: int,
    sampling: Any,
    graphs: DraftGraphs | None = None,
    widths: list[int] | None = None,
    found: Sequence[Lookup] = (),
    by_position: bool = False,
) -> Drafts:
    """Draft after `make_step`."""
    session = DraftSession(model, vllm_config("cpu"), num_drafts, num_drafts, seeds_by_position=by_position)
    if graphs is not None:
        session.graphs = graphs
    return session.propose(make_step(model, num_drafts, sampling), widths or [num_drafts] * 3, found)


def sampled(*temperatures: float, **generators: torch.Generator) -> Any:
    """The sampling of requests, some of which may have generators: `row0=...`."""
    by_row = {int(name.removeprefix("row")): generator for name, generator in generators.items()}
    return SimpleNamespace(all_greedy=False, temperature=torch.tensor(temperatures), generators=by_row)


def test_one_operator_drafts_what_vllms_layers_draft(model):
    drafted, probs = propose(model, 4, None)
    assert drafted.shape == (3, 4) and drafted.dtype == torch.int64 and probs is None
    # Rejected rows are written again, with the same states.
    capped(model)
    assert torch.equal(propose(model, 4, None)[0], drafted)


def test_a_draft_vocabulary_drafts_the_same_by_operator_by_graph_and_by_vllms_layers(reduced):
    sampling = sampled(0.0, 0.8, 1.2)
    drafted, _ = propose(reduced, 4, None)
    assert torch.isin(drafted, TOKEN_IDS).all()
    by_operator, probs = propose(reduced, 4, sampling)
    assert torch.equal(by_operator[0], drafted[0]) and torch.isin(by_operator, TOKEN_IDS).all()
    assert probs.shape == (3, 4, SIZES.vocabulary) and probs.dtype == torch.float32
    outside = torch.ones(SIZES.vocabulary, dtype=torch.bool).index_fill(0, TOKEN_IDS, False)
    assert (probs[..., outside] == 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 4))
    replayed, replayed_probs = propose(reduced, 4, sampling, DraftGraphs(Recorder(), [4]))
    assert torch.equal(replayed, by_operator)
    torch.testing.assert_close(replayed_probs, probs)
    head = reduced.lm_head.weight[: SIZES.vocabulary]
    for change in (wrapped, capped):
        # Of the head: first its rows are plain, then vLLM's layers compute all logits.
        change(reduced)
        reduced.logits_processor = reduced.logits_processor if change is wrapped else lambda _, hidden: hidden @ head.T
        assert plain_weights(reduced) is None
        assert torch.equal(propose(reduced, 4, None)[0], drafted)
        by_layers, layer_probs = propose(reduced, 4, sampling)
        assert torch.equal(by_layers, by_operator)
        torch.testing.assert_close(layer_probs, probs)
        assert (layer_probs[..., outside] == 0).all()


def test_what_is_looked_up_need_not_be_in_the_draft_vocabulary(reduced):
    found = [Lookup((), 0), Lookup((5, 6), 2), Lookup((), 0)]
    joined, probs = propose(reduced, 2, sampled(1.0, 1.0, 1.0), found=found)
    assert joined[1].tolist() == [5, 6] and probs[1].argmax(-1).tolist() == [5, 6]


def test_no_draft_asked_for_still_fills_the_cache(model):
    before = model.case.cache.clone()
    drafted, _ = propose(model, 0, None)
    assert drafted.shape == (3, 0)
    assert not torch.equal(before.nan_to_num(), model.case.cache.nan_to_num())


def test_sampled_drafts_come_with_their_distributions(model):
    sampling = sampled(0.0, 0.8, 1.2)
    greedily, _ = propose(model, 3, None)
    drafted, probs = propose(model, 3, sampling)
    assert probs.shape == (3, 3, SIZES.vocabulary) and probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 3))
    assert torch.equal(drafted[0], greedily[0]), "temperature 0 drafts greedily"
    assert (probs.gather(-1, drafted.unsqueeze(-1)) > 0).all()
    # The same numbers draw the same from vLLM's layers.
    capped(model)
    again, probs_again = propose(model, 3, sampling)
    assert torch.equal(again, drafted)
    torch.testing.assert_close(probs_again, probs)
    sampling.all_greedy = True
    assert propose(model, 3, sampling)[1] is None


def test_what_is_looked_up_takes_the_place_of_drafts_and_may_be_more(model):
    drafted, probs = propose(model, 2, sampled(1.0, 1.0, 1.0))
    found = [Lookup((), 0), Lookup((5, 6, 7, 8, 9, 9), 2), Lookup((), 0)]
    joined, joined_probs = propose(model, 2, sampled(1.0, 1.0, 1.0), widths=[2, 4, 2], found=found)
    assert joined == [drafted[0].tolist(), [5, 6, 7, 8], drafted[2].tolist()]
    assert joined_probs.shape == (3, 4, SIZES.vocabulary)
    assert torch.equal(joined_probs[0, :2], probs[0])
    assert joined_probs[1].argmax(-1).tolist() == [5, 6, 7, 8]


def test_where_all_is_looked_up_nothing_else_is_drafted(model, monkeypatch):
    monkeypatch.setattr(drafting, "draft_tokens", None)
    found = [Lookup((1, 2, 3, 4), 2), Lookup((5, 6, 7, 8), 4), Lookup((9, 9, 9, 9), 3)]
    for sampling in (None, sampled(1.0, 1.0, 1.0)):
        joined, probs = propose(model, 2, sampling, found=found)
        assert joined.tolist() == [[1, 2], [5, 6], [9, 9]] and joined.dtype == torch.int64 and probs is None
    assert propose(model, 2, None, widths=[4, 2, 4], found=found)[0] == [[1, 2, 3, 4], [5, 6], [9, 9, 9, 9]]


def test_a_request_with_a_seed_takes_as_many_numbers_whatever_is_looked_up(model):
    found = [Lookup((1, 2), 2), Lookup((5, 6), 4), Lookup((9, 9), 3)]
    states = []
    for some in ((), found):
        generator = torch.Generator().manual_seed(0)
        propose(model, 2, sampled(1.0, 1.0, 1.0, row1=generator), found=some)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_a_request_with_a_seed_draws_its_drafts_from_it():
    def draw(seed: int) -> torch.Tensor:
        sampling = sampled(1.0, 1.0, 1.0, row1=torch.Generator().manual_seed(seed))
        return drafting._random_numbers(sampling.generators, torch.empty(3, 8))

    first, second, other = draw(5), draw(5), draw(6)
    assert torch.equal(first[1], second[1]) and not torch.equal(first[1], other[1])
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[2], second[2])
    assert first.dtype == torch.float64 and first.min() >= 0 and first.max() < 1


def test_by_position_a_seeds_drafts_are_the_same_whatever_else_is_drafted(model):
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    drafted, probs = propose(model, 4, sampled(1.0, 1.0, 0.0, row1=generator), by_position=True)
    assert torch.equal(generator.get_state(), state), "verification takes the numbers, by position"
    assert probs.shape == (3, 4, SIZES.vocabulary), "for the request without a seed"
    shorter, _ = propose(model, 2, sampled(0.5, 1.0, 1.0, row1=generator), by_position=True)
    assert shorter[1].tolist() == drafted[1, :2].tolist()
    seeds.draw_numbers(generator, 1)
    later, _ = propose(model, 4, sampled(1.0, 1.0, 0.0, row1=generator), by_position=True)
    assert later[1].tolist() != drafted[1].tolist()
    assert torch.equal(later[2], drafted[2]), "greedy"


# On a GPU


@pytest.mark.parametrize("temperatures", [None, [0.0, 0.8, 1.2]])
def test_graphs_draft_what_the_operator_drafts(model, temperatures):
    sampling = temperatures and sampled(*temperatures)
    drafted, probs = propose(model, 4, sampling)
    recorder = Recorder()
    graphs = DraftGraphs(recorder, [4])
    # Captured at the first call, replayed at both; the rejected rows are written again, with the same states.
    for _ in range(2):
        replayed, replayed_probs = propose(model, 4, sampling, graphs)
        assert torch.equal(replayed, drafted)
        if temperatures is None:
            assert replayed_probs is None
        else:
            torch.testing.assert_close(replayed_probs, probs)
    assert len(recorder.graphs) == 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A proposer as vLLM's on a GPU, of which only settings are read, with compiled kernels."""
    monkeypatch.setattr(plugin, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(plugin.backend, "backend", lambda device="cpu": "compiled")
    monkeypatch.setattr(plugin, "plain_weights", lambda model: object())
    return SimpleNamespace(
        model=bare(QuickMergeForCausalLM, session=DraftSession(None, None, 4, 4)),
        device=torch.device("cuda"),
        vllm_config=vllm_config(),
        use_heterogeneous_vocab=False,
        supports_mm_inputs=False,
    )


def vllm_config(device: str = "cuda", mode: Any = CUDAGraphMode.FULL_AND_PIECEWISE, **settings: Any) -> Any:
    settings = {"vocabulary": 100_000, "max_num_seqs": 64, "shards": 1, "replicas": 1, "drafted": None} | settings
    v2 = settings.pop("v2", True)
    drafter = QuickMergeConfig(
        hidden_size=192,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=settings["vocabulary"],
        draft_vocab_size=settings["drafted"],
    )
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        use_v2_model_runner=v2,
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=settings["shards"], data_parallel_size=settings["replicas"]
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=settings["max_num_seqs"]),
        compilation_config=SimpleNamespace(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 2, 4, 8, 16, 24, 128]),
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(model=drafter))
        ),
    )


def test_our_loop_drafts_on_a_gpu_with_kernels_and_plain_weights(gpu, monkeypatch):
    assert plugin.can_draft(gpu)
    with monkeypatch.context() as patch:
        patch.setattr(plugin, "plain_weights", lambda model: None)
        assert not plugin.can_draft(gpu)
    with monkeypatch.context() as patch:
        patch.setattr(plugin.backend, "backend", lambda device="cpu": "reference")
        assert not plugin.can_draft(gpu)
        gpu.device = torch.device("cpu")
        assert plugin.can_draft(gpu), "on a CPU the references draft"
    gpu.vllm_config = vllm_config(replicas=2)
    assert not plugin.can_draft(gpu), "its ranks wait for each other in vLLM's loop"


def tries(monkeypatch: pytest.MonkeyPatch, outcome: bool) -> list[Any]:
    """Replace the try on the GPU by its outcome, and return what it is asked for."""
    asked: list[Any] = []
    cuda_graphs._tried.cache_clear()
    monkeypatch.setattr(cuda_graphs, "operators_replay", lambda capture, *sizes: asked.append(sizes) or outcome)
    return asked


def test_the_target_keeps_its_full_graphs_without_kernels_as_they_do_not_hold_our_layer(gpu, monkeypatch):
    support = QuickMergeMetadataBuilder.get_cudagraph_support
    monkeypatch.setattr(cuda_graphs.backend, "backend", lambda device="cpu": "reference")
    monkeypatch.setattr(attention.compat, "in_force", lambda patch: patch is SPECULATOR)
    assert support(vllm_config(), None) == AttentionCGSupport.ALWAYS
    monkeypatch.setattr(attention.compat, "in_force", lambda patch: False)
    assert support(vllm_config(v2=False), None) == AttentionCGSupport.ALWAYS
    assert support(vllm_config(), None) == AttentionCGSupport.NEVER, "vLLM's own speculator would capture it"


def test_vllms_speculator_may_capture_the_attention_where_a_try_on_this_gpu_worked(gpu, monkeypatch):
    support = QuickMergeMetadataBuilder.get_cudagraph_support
    monkeypatch.setattr(attention.compat, "in_force", lambda patch: False)
    theirs = inspect.signature(AttentionMetadataBuilder.get_cudagraph_support).parameters
    assert inspect.signature(support).parameters == theirs
    asked = tries(monkeypatch, True)
    for _ in range(2):
        assert support(vllm_config(shards=2), None) == AttentionCGSupport.ALWAYS
    assert asked == [("cuda", torch.bfloat16, 3, 1, 32, MergeConfig())], "tried once"
    asked = tries(monkeypatch, False)
    assert support(vllm_config(), None) == AttentionCGSupport.NEVER and len(asked) == 1
    asked = tries(monkeypatch, True)
    assert support(vllm_config("cpu"), None) == AttentionCGSupport.NEVER
    monkeypatch.setattr(cuda_graphs.backend, "backend", lambda device="cpu": "reference")
    assert support(vllm_config(), None) == AttentionCGSupport.NEVER
    assert not asked, "tried where it could not work"


def test_the_sizes_that_vllm_captures_are_taken_up_to_the_batch_and_what_memory_allows(gpu, monkeypatch):
    tries(monkeypatch, True)
    assert cuda_graphs.graph_sizes(vllm_config()) == [1, 2, 4, 8, 16, 24]
    for smaller in ({"vocabulary": 1000}, {"drafted": 1000}):
        assert cuda_graphs.graph_sizes(vllm_config(**smaller)) == [1, 2, 4, 8, 16, 24, 128]
    assert cuda_graphs.graph_sizes(vllm_config(max_num_seqs=5)) == [1, 2, 4, 8]
    assert cuda_graphs.graph_sizes(vllm_config(max_num_seqs=8)) == [1, 2, 4, 8]
    assert cuda_graphs.graph_sizes(vllm_config(mode=CUDAGraphMode.NONE)) == []
    tries(monkeypatch, False)
    assert cuda_graphs.graph_sizes(vllm_config()) == []


def test_the_attention_layer_reads_no_value_on_the_host_and_copies_none_from_it(model):
    """As vLLM captures it: padded rows of a batch of fixed size, in its full graphs and in those of its draft loop."""
    case, rows = model.case, 8
    impl = QuickMergeImpl(4, 16, 0.25, 2, None, None, "auto", merge=MERGE, max_rows=5)
    query, key, value = torch.randn(rows, 64), torch.randn(rows, 32), torch.randn(rows, 32)
    tensors = (
        torch.tensor([0, 2, 4, 5], dtype=torch.int32),
        case.num_tokens,
        case.block_table,
        torch.arange(rows - 1),
        query.view(rows, 4, 16),
        key.view(rows, 2, 16),
        value.view(rows, 2, 16),
        case.cache,
        torch.empty(rows, 4, 16),
        model.model.layer.slopes,
        model.model.layer.far_bias,
    )
    starts, lengths, table, slots, query, key, value, cache, out, impl.slopes, impl.far_bias = without_values(*tensors)
    metadata = QuickMergeMetadata(rows - 1, starts, lengths, table, slots)
    with WithoutHost():
        assert impl.forward(None, query, key, value, cache, metadata, out) is out


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return the proposer and what the runner gets of `propose`, for a model of ours whose session drafts so."""

    def propose(draft: Callable[..., Any], drafts_after_step: bool, ours: bool = True) -> tuple[Any, Any]:
        monkeypatch.setattr(draft_loop, "can_draft", lambda proposer: ours)
        monkeypatch.setattr(DraftStep, "from_v1", lambda *args: args[1:])
        session = DraftSession(None, None, 4, 4)
        monkeypatch.setattr(session, "draft", draft)
        proposer = SimpleNamespace(
            model=bare(QuickMergeForCausalLM, drafts_after_step=drafts_after_step, session=session),
            _last_draft_probs="stale",
            device=torch.device("cpu"),
        )
        return proposer, draft_loop.with_draft_loop(lambda *args: "vLLM's")(proposer, 4, 0, 1, 2, [8, 9], 4, 5, 6)

    return propose


@pytest.mark.parametrize("drafts", [torch.tensor([[5, 6], [7, 8]]), torch.empty(2, 0), [[5, 6], [7]]])
@pytest.mark.parametrize("probs", ["distributions", None])
def test_drafts_are_made_when_the_engine_asks_for_them(proposed, drafts, probs):
    asked = []
    proposer, pending = proposed(lambda step: asked.append(step) or Drafts(drafts, probs), drafts_after_step=True)
    assert not asked and proposer._last_draft_probs is None
    runner = SimpleNamespace(
        _draft_token_ids=pending,
        _draft_probs=None,
        _draft_prob_req_ids=None,
        input_batch=SimpleNamespace(req_ids=["a", "b"], generators={}),
        device=torch.device("cpu"),
    )
    take = with_pending_drafts(lambda self: self._draft_token_ids)
    expected = drafts if isinstance(drafts, list) else drafts.tolist()
    # Without positions, which ours does not read; asked twice, drafted once.
    for _ in range(2):
        assert take(runner) == expected and asked == [(4, 0, 2, [8, 9], 4, 5, 6, None, [])]
    assert (runner._draft_probs, runner._draft_prob_req_ids) == ((probs, ["a", "b"]) if probs else (None, None))


def test_elsewhere_drafts_are_made_at_once(proposed):
    for mine, expected, probs in ((True, "ours", "distributions"), (False, "vLLM's", "stale")):
        proposer, drafts = proposed(lambda step: Drafts("ours", "distributions"), drafts_after_step=False, ours=mine)
        assert drafts == expected and proposer._last_draft_probs == probs
    runner = SimpleNamespace(_draft_token_ids="tensor")
    assert with_pending_drafts(lambda self: self._draft_token_ids)(runner) == "tensor"


def test_a_step_whose_drafting_fails_has_no_drafts_and_the_next_one_drafts_again(proposed, caplog):
    def failing(step: Any) -> None:
        raise IndexError("page 17")

    proposer, drafts = proposed(failing, drafts_after_step=False)
    assert drafts == [[], []] and proposer._last_draft_probs is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "this step goes on without drafts" in record.message
    assert "page 17" in str(record.exc_info)
    assert proposer.model.session.attempt(lambda: "drafts") == "drafts"
    assert plugin.no_drafts(3, 4, torch.device("meta")).token_ids.shape == (3, 4)


def test_drafting_that_fails_in_three_steps_in_a_row_stays_off_and_says_so(caplog):
    session = DraftSession(None, None, 4, 4)
    fails = iter([True, True, False, True, True, True])
    calls = []

    def draft() -> str:
        calls.append("asked")
        if next(fails):
            raise IndexError
        return "drafts"

    answers = [session.attempt(draft) for _ in range(8)]
    assert answers == [None, None, "drafts", *[None] * 5]
    assert len(calls) == 6, "a success in between begins anew; after three it is not asked again"
    assert ["after 3 steps in a row this engine" in record.message for record in caplog.records] == [False] * 4 + [True]


def test_what_a_failed_step_has_left_half_noted_is_forgotten(monkeypatch):
    """An index that lacks tokens in the middle, and times of a step that did not end."""
    session = DraftSession(None, None, 4, 4, lookup_length=3)
    state = SimpleNamespace(sampling_params=None)
    session.note_batch(["a"], {"a": state})
    controller, request = session.controller, session.batch[0]
    session.attempt(lambda: 1 / 0)
    session.note_batch(["a"], {"a": state})
    assert session.controller is not controller and session.batch[0] is not request


def test_distributions_that_verification_weighs_by_are_finite_whatever_the_pages_hold(model):
    """Or it would write other tokens than the target's. The first request has read what is not finite."""
    expected, _ = propose(model, 3, sampled(1.0, 0.0, 0.0))
    # Of 70 tokens one of the last 24, which are not merged yet.
    keys, _, _ = split_page(model.case.cache, SIZES.head_dim)
    keys[model.case.block_table[0, 65 // keys.shape[2]].long(), :, 65 % keys.shape[2]] = float("nan")
    drafted, probs = propose(model, 3, sampled(1.0, 0.0, 0.0))
    assert probs.isfinite().all()
    assert torch.equal(probs[0], torch.nn.functional.one_hot(drafted[0], SIZES.vocabulary).float())
    assert torch.equal(drafted[1:], expected[1:]) and (probs[1:].max(-1).values < 1).all()


def test_distributions_are_for_sampled_requests_without_a_seed(model):
    """Drafts of a seed are verified by its numbers. Distributions take many times as long as these."""
    seeded = {"row0": torch.Generator().manual_seed(0)}
    before = model.case.cache.clone()
    alone, probs = propose(model, 3, sampled(1.0, 0.0, 0.0, **seeded), by_position=True)
    assert probs is None
    model.case.cache.copy_(before)
    mixed, probs = propose(model, 3, sampled(1.0, 0.0, 0.7, **seeded), by_position=True)
    assert torch.equal(mixed[:2], alone[:2]) and probs.shape == (3, 3, SIZES.vocabulary)
