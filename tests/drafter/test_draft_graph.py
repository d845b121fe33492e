"""Draft graphs: the loop that can be captured, what replays draft, and that a failing capture costs nothing but speed.

A double stands for the CUDA graph: it repeats the operators that were recorded, on the tensors they were recorded on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from draft_cases import DraftCase, PriorSizes, make_case
from support.recorded_graph import Recorder, WithoutHost, without_values
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.drafter.loops.cuda_graph import CudaCapture, operators_replay
from qm_spec.drafter.loops.gathered import DraftLoop
from qm_spec.drafter.loops.graphs import DraftGraphs
from qm_spec.drafter.loops.paged import DraftInputs, PagedLoop, draw
from qm_spec.ops import backend, merge_groups_
from qm_spec.ops.draft_tokens import DenseLayer, DraftWeights

SIZES = PriorSizes(hidden=48, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=96, vocabulary=200)
CONFIG = MergeConfig(window=24, group_size=8, schedule=(4, 2, 1))
UNMERGED = MergeConfig(window=10_000, group_size=8, schedule=(4, 2, 1))
LENGTHS = (70, 9, 200, 460, 33, 131, 16, 90, 300)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def loop_of(case: DraftCase, cache: Tensor | None = None) -> PagedLoop:
    return PagedLoop(case.weights, case.eps, case.cache if cache is None else cache, CONFIG)


def inputs_of(case: DraftCase, batch: int, num_drafts: int, sampled: bool = False) -> DraftInputs:
    """Take the first requests of the case with new states, ids and numbers to sample with."""
    state, next_ids = torch.randn(batch, SIZES.hidden), torch.randint(0, SIZES.vocabulary, (batch,)).int()
    inputs = DraftInputs(case.block_table[:batch], case.num_tokens[:batch], state.to(case.state.dtype), next_ids)
    if not sampled:
        return inputs
    uniform = torch.rand(batch, num_drafts, dtype=torch.float64)
    return inputs._replace(temperature=torch.tensor([0.0, 0.7, 1.3] * 3)[:batch], uniform=uniform)


def assert_same(drafts: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(drafts[0], expected[0])
    torch.testing.assert_close(drafts[1], expected[1], rtol=1e-4, atol=1e-6)


# The loop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_drafts", [1, 2, 6])
def test_the_loop_errs_at_most_twice_as_much_as_plain_pytorch(dtype: torch.dtype, num_drafts: int) -> None:
    case = make_case(LENGTHS, SIZES, dtype, config=CONFIG)
    inputs = inputs_of(case, len(LENGTHS), num_drafts, sampled=True)._replace(temperature=torch.ones(len(LENGTHS)))
    case.state, case.next_ids = inputs.state, inputs.next_ids
    ids, probs = loop_of(case).draft(inputs, num_drafts)
    assert ids.shape == (9, num_drafts) and ids.dtype == torch.int64
    assert probs.shape == (9, num_drafts, SIZES.vocabulary) and probs.dtype == torch.float32
    exact = case.replay(ids, torch.float64).log_softmax(-1)
    plain = case.replay(ids, dtype).double().log_softmax(-1)
    error, plain_error = (probs.double().log() - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * plain_error + 1e-5, f"{error:.1e} against {plain_error:.1e}"


@pytest.mark.parametrize("draft_vocabulary", [None, 37])
@pytest.mark.parametrize("num_drafts", [1, 5])
def test_the_loop_drafts_what_the_operator_drafts(num_drafts: int, draft_vocabulary: int | None) -> None:
    case = make_case(LENGTHS, replace(SIZES, draft_vocabulary=draft_vocabulary), config=CONFIG)
    for sampled in (False, True):
        inputs = inputs_of(case, len(LENGTHS), num_drafts, sampled)
        case.state, case.next_ids = inputs.state, inputs.next_ids.long()
        expected = case.draft(num_drafts, inputs.temperature, inputs.uniform)
        assert_same(loop_of(case).draft(inputs, num_drafts), expected)


def test_the_loop_merges_what_has_grown_old_first() -> None:
    case = make_case(LENGTHS, SIZES, config=UNMERGED)
    merged = case.cache.clone()
    merge_groups_(merged, case.block_table, case.num_tokens, SIZES.head_dim, CONFIG)
    assert not torch.equal(case.cache.nan_to_num(), merged.nan_to_num())
    inputs = inputs_of(case, len(LENGTHS), 3)
    drafts = loop_of(case).draft(inputs, 3)
    assert torch.equal(case.cache.nan_to_num(), merged.nan_to_num())
    assert_same(drafts, loop_of(case, merged).draft(inputs, 3))


def test_ids_out_of_range_are_not_looked_up() -> None:
    case = make_case([20, 20], SIZES, config=CONFIG)
    inputs = inputs_of(case, 2, 2)
    for wrong, right in ((-1, 0), (SIZES.vocabulary + 50, SIZES.vocabulary - 1)):
        drafts = [loop_of(case).draft(inputs._replace(next_ids=torch.full((2,), id)), 2) for id in (wrong, right)]
        assert torch.equal(drafts[0][0], drafts[1][0])


def test_a_drawn_token_has_the_distribution_it_is_returned_with() -> None:
    """Chi-squared over 12 tokens, 20000 draws: above 40 by chance less than once in 20000 runs."""
    logits = (3 * torch.randn(1, 12)).expand(20_000, -1)
    uniform = torch.rand(20_000, dtype=torch.float64)
    ids, probs = draw(logits, torch.full((20_000,), 1.5), uniform)
    expected = probs[0].double() * 20_000
    assert ((ids.bincount(minlength=12) - expected) ** 2 / expected).sum() < 40
    ids, _ = draw(logits, torch.zeros(20_000), uniform)
    assert (ids == logits[0].argmax()).all(), "temperature 0 takes the best token"


# Nothing is read on the host


@pytest.mark.parametrize("draft_vocabulary", [None, 37])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_loop_reads_no_value_on_the_host_and_copies_none_from_it(
    sampled: bool, draft_vocabulary: int | None
) -> None:
    sizes = replace(SIZES, draft_vocabulary=draft_vocabulary)
    case = make_case(LENGTHS, sizes, torch.bfloat16, config=CONFIG)
    cache, weights, inputs = without_values(case.cache, case.weights, inputs_of(case, len(LENGTHS), 4, sampled))
    with WithoutHost():
        ids, probs = PagedLoop(weights, case.eps, cache, CONFIG).draft(inputs, 4)
    assert ids.shape == (9, 4) and probs.shape == (9, 4 if sampled else 0, sizes.head_rows)


def test_what_a_graph_could_not_hold_would_be_noticed() -> None:
    case = make_case(LENGTHS, SIZES, config=CONFIG)
    cache, weights, inputs = without_values(case.cache, case.weights, inputs_of(case, len(LENGTHS), 2))
    loop = DraftLoop(
        DenseLayer(weights, case.eps), lambda ids: weights.embedding[ids], lambda x: x @ weights.head.T, CONFIG
    )
    with WithoutHost():
        with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
            loop.draft(cache, *inputs[:4], 2, lambda logits: logits.argmax(-1))
        with pytest.raises(AssertionError, match="has a tensor on the cpu"):
            torch.tensor([1.0, 2.0]).to("meta")
        with pytest.raises(NotImplementedError, match="nonzero"):
            inputs.state[inputs.num_tokens > 0]


# Graphs


def make_unmerged(lengths: tuple[int, ...] = LENGTHS) -> DraftCase:
    return make_case(lengths, SIZES, config=UNMERGED)


@pytest.mark.parametrize("sampled", [False, True])
def test_replays_draft_and_merge_what_the_loop_does_for_every_batch_size(sampled: bool) -> None:
    case, capture = make_unmerged(), Recorder()
    graphs, own_cache = DraftGraphs(capture, [1, 8, 3]), case.cache.clone()
    loop, replayed = loop_of(case), loop_of(case, own_cache)
    full = case.num_tokens
    # Each size comes again, with other states, other lengths and other pages due.
    for share in (0.1, 0.4, 1.0):
        case.num_tokens = (full * share).int()
        for batch in (1, 2, 3, 5, 8, 4, 1):
            inputs = inputs_of(case, batch, 4, sampled)
            assert_same(graphs.draft(replayed, inputs, 4), loop.draft(inputs, 4))
            assert torch.equal(own_cache.nan_to_num(), case.cache.nan_to_num())
    assert len(capture.graphs) == 3


def test_other_depths_and_ways_to_sample_get_graphs_of_their_own() -> None:
    case, capture = make_case(LENGTHS, SIZES, config=CONFIG), Recorder()
    graphs, loop = DraftGraphs(capture, [4]), loop_of(case)
    for _ in range(2):
        for num_drafts, sampled in ((4, False), (2, False), (4, True)):
            inputs = inputs_of(case, 3, num_drafts, sampled)
            assert_same(graphs.draft(loop, inputs, num_drafts), loop.draft(inputs, num_drafts))
    assert len(capture.graphs) == 3


def test_recording_and_padding_touch_no_page() -> None:
    case, capture = make_unmerged(), Recorder()
    graphs, loop = DraftGraphs(capture, [2, 4]), loop_of(case)
    before = case.cache.clone()
    young = inputs_of(case, 4, 2)._replace(num_tokens=torch.full((4,), 9, dtype=torch.int32))
    graphs.draft(loop, young, 2)
    assert torch.equal(case.cache.nan_to_num(), before.nan_to_num()), "recording merged pages"
    for batch, captured in ((3, 1), (1, 2)):
        graphs.draft(loop, inputs_of(case, 4, 2), 2)
        # The rows of that batch are still in the buffers, and their pages are due again.
        case.cache.copy_(before)
        first = {name: x[:batch] for name, x in young._asdict().items() if x is not None}
        graphs.draft(loop, young._replace(**first), 2)
        assert torch.equal(case.cache.nan_to_num(), before.nan_to_num()), "padding or recording merged pages"
        assert len(capture.graphs) == captured


def test_drafts_are_the_callers_own() -> None:
    case = make_case(LENGTHS, SIZES, config=CONFIG)
    graphs, loop = DraftGraphs(Recorder(), [4]), loop_of(case)
    first = graphs.draft(loop, inputs_of(case, 4, 3, sampled=True), 3)
    kept = [x.clone() for x in first]
    graphs.draft(loop, inputs_of(case, 4, 3, sampled=True), 3)
    assert torch.equal(first[0], kept[0]) and torch.equal(first[1], kept[1])


def test_batches_beyond_the_sizes_need_no_graph() -> None:
    case, capture = make_case(LENGTHS, SIZES, config=CONFIG), Recorder()
    loop = loop_of(case)
    for sizes, batch in (([2, 4], 5), ([], 1)):
        inputs = inputs_of(case, batch, 2)
        assert_same(DraftGraphs(capture, sizes).draft(loop, inputs, 2), loop.draft(inputs, 2))
    assert not capture.graphs


def test_a_cache_or_weight_at_another_place_ends_the_graphs() -> None:
    case, capture = make_case(LENGTHS, SIZES, config=CONFIG), Recorder()
    graphs, inputs = DraftGraphs(capture, [4]), inputs_of(case, 4, 3)
    graphs.draft(loop_of(case), inputs, 3)
    other = make_case(LENGTHS, SIZES, config=CONFIG)
    for change in ({"cache": other.cache}, {"weights": case.weights._replace(head=other.weights.head)}):
        loop = PagedLoop(**{**vars(loop_of(case)), **change})
        before = len(capture.graphs)
        for _ in range(2):
            assert_same(graphs.draft(loop, inputs, 3), loop.draft(inputs, 3))
        assert len(capture.graphs) == before + 1


@pytest.mark.parametrize("good", [0, 1])
def test_a_capture_that_fails_costs_one_warning_and_no_draft(good: int, caplog: pytest.LogCaptureFixture) -> None:
    case, recorder, attempts = make_case(LENGTHS, SIZES, config=CONFIG), Recorder(), []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        attempts.append(run)
        if len(attempts) > good:
            raise RuntimeError("operation not permitted when stream is capturing")
        return recorder(run)

    graphs, loop = DraftGraphs(capture, [1, 4]), loop_of(case)
    with caplog.at_level(logging.WARNING):
        for batch in (1, 3, 1, 4, 9):
            inputs = inputs_of(case, batch, 3)
            assert_same(graphs.draft(loop, inputs, 3), loop.draft(inputs, 3))
    assert len(attempts) == good + 1, "tried again"
    (record,) = caplog.records
    assert "operation not permitted" in record.getMessage() and "runs without graphs" in record.getMessage()


def test_buffers_that_do_not_fit_cost_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case(LENGTHS, SIZES, config=CONFIG)
    graphs, loop, inputs = DraftGraphs(Recorder(), [4]), loop_of(case), inputs_of(case, 4, 3)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qm_spec.drafter.loops.graphs._make_buffers", out_of_memory)
    for _ in range(2):
        assert_same(graphs.draft(loop, inputs, 3), loop.draft(inputs, 3))
    assert len(caplog.records) == 1


# The try on the machine itself

OPERATORS = ("cpu", torch.float32, 4, 2, 16, CONFIG)


def test_operators_that_replay_right_are_taken(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    assert operators_replay(recorder, *OPERATORS)
    names = [str(call[0]) for call in recorder.graphs[0].calls]
    for name in ("append_kv_", "merge_groups_", "merged_attention"):
        assert any(f"qm_spec.{name}" in call for call in names), name
    assert not caplog.records


@pytest.mark.parametrize("op", ["append_kv_", "merge_groups_", "merged_attention"])
def test_an_operator_that_a_replay_leaves_out_is_noticed(op: str, caplog: pytest.LogCaptureFixture) -> None:
    class Forgetful(Recorder):
        def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
            replay = super().__call__(run)
            calls = self.graphs[0].calls
            self.graphs[0].calls = [call for call in calls if f"qm_spec.{op}" not in str(call[0])]
            assert len(self.graphs[0].calls) == len(calls) - 1
            if op == "append_kv_":
                # Both runs of the capture have written; what they wrote is lost.
                cache = next(call[1][0] for call in calls if "append_kv_" in str(call[0]))
                cache[-1].zero_()
            return replay

    assert not operators_replay(Forgetful(), *OPERATORS)
    assert "give other values" in caplog.text


def test_operators_that_cannot_be_captured_are_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    def capture(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("no capture here")

    assert not operators_replay(capture, *OPERATORS)
    assert len(caplog.records) == 1 and "RuntimeError: no capture here" in caplog.text


def test_a_failed_capture_leaves_the_callers_stream_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The context of torch ends the capture first and, if that raises, never gives the stream back."""
    current, events = ["engine's"], []

    class Graph:
        def pool(self) -> str:
            return "pool"

        def replay(self) -> None: ...

    @contextlib.contextmanager
    def graph(graph: Graph, pool: str | None, capture_error_mode: str) -> Any:
        current[0] = "capture's"
        events.append((pool, capture_error_mode))
        yield
        if len(events) == 3:
            raise RuntimeError("the capture was invalidated")
        current[0] = "engine's"

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda _: None, name=current[0])
    )
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream.name))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    runs: list[str] = []
    capture = CudaCapture()
    for _ in range(2):
        capture(lambda: runs.append(current[0]))
    assert runs == ["engine's", "capture's"] * 2, "once before each capture"
    with pytest.raises(RuntimeError, match="invalidated"):
        capture(lambda: None)
    assert current == ["engine's"]
    assert events == [(None, "thread_local"), ("pool", "thread_local"), ("pool", "thread_local")]


# On a GPU


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available() or backend.backend("cuda") != "compiled":
        pytest.skip("there is no CUDA GPU, or the CUDA kernels were not built: make test-gpu")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", [MergeConfig(), CONFIG], ids=["default", "short window"])
def test_the_operators_replay_on_this_gpu(gpu: str, dtype: torch.dtype, merge: MergeConfig) -> None:
    for heads in ((6, 2, 32), (16, 4, 128), (4, 4, 64)):
        assert operators_replay(CudaCapture(), gpu, dtype, *heads, merge)


@pytest.mark.gpu
@pytest.mark.parametrize("sampled", [False, True])
def test_graphs_on_a_gpu_draft_and_merge_what_the_loop_does(gpu: str, sampled: bool) -> None:
    case = make_unmerged()
    case.cache, case.block_table = case.cache.to(gpu), case.block_table.to(gpu)
    case.weights = DraftWeights._make(weight.to(gpu) for weight in case.weights)
    graphs, own_cache = DraftGraphs(CudaCapture(), [1, 3, 8]), case.cache.clone()
    loop, replayed = loop_of(case), loop_of(case, own_cache)
    full = case.num_tokens
    for share in (0.1, 0.4, 1.0):
        case.num_tokens = (full * share).int()
        for batch in (1, 2, 3, 5, 8, 4, 1):
            inputs = DraftInputs._make(x if x is None else x.to(gpu) for x in inputs_of(case, batch, 4, sampled))
            assert_same(graphs.draft(replayed, inputs, 4), loop.draft(inputs, 4))
            assert torch.equal(own_cache.nan_to_num(), case.cache.nan_to_num())
    assert len(graphs._replays) == 3, "captured, and not given up"


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu_leaves_it_usable(gpu: str) -> None:
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CudaCapture()(lambda: torch.ones(3, device=gpu).sum().item())
    assert torch.cuda.current_stream() == stream
    assert torch.ones(3, device=gpu).sum().item() == 3
    assert operators_replay(CudaCapture(), gpu, torch.float32, 4, 2, 16, CONFIG), "the next capture works"
