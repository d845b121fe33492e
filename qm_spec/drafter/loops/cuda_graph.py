"""CUDA graphs of torch, and whether the operators of the merged cache hold in one on this machine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.drafter.loops.graphs import Capture
from qm_spec.ops import append_kv_, merge_groups_, merged_attention
from qm_spec.ops.page import slot_elements

logger = logging.getLogger(__name__)


class CudaCapture:
    """Captures work of the current stream; the graphs share memory, so they must run one after the other."""

    def __init__(self) -> None:
        self._latest: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run once, then record: libraries make their workspaces and load their kernels at the first call."""
        stream = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        pool = None if self._latest is None else self._latest.pool()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                run()
            stream.wait_stream(side)
            # Other threads of an engine go on, and what they call must not end the capture.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                run()
        finally:
            # A capture that fails leaves its own stream behind as the current one.
            torch.cuda.set_stream(stream)
        # A graph that is kept keeps the memory for the next ones.
        self._latest = graph
        return graph.replay


def operators_replay(
    capture: Capture,
    device: str,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    config: MergeConfig,
) -> bool:
    """Tell whether the three operators of the merged cache, captured, do on other lengths what they do without a graph.

    One small graph of the sizes in use is captured and replayed, and caches and outputs are compared byte by byte.
    What fails is logged.

    Args:
        capture: records and returns what replays.
        device: where to try.
        dtype: of the cache.
        num_heads: H.
        num_kv_heads: G.
        head_dim: d.
        config: of the merged cache.
    """
    try:
        differing = _differing(capture, device, dtype, num_heads, num_kv_heads, head_dim, config)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if not differing:
            return True
        reason = f"replayed, they give other values at {differing} tokens"
    logger.warning(
        "qm_spec: the operators of the merged cache do not work in a CUDA graph on this machine (%s), so the drafter "
        "runs without graphs, which is slower and drafts the same",
        reason,
    )
    return False


def _differing(
    capture: Capture,
    device: str,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    config: MergeConfig,
) -> list[int]:
    """Return the lengths, of those tried, at which a replay and the operators without a graph differ."""
    group = config.group_size
    # Less than a group, a window, and enough for groups of every level of the schedule.
    lengths = [group // 2, config.window, config.level_distances[len(config.schedule) - 1] + 2 * group]
    num_pages = -(-lengths[-1] // group)
    rows = torch.Generator().manual_seed(0)
    keys = torch.randn(num_pages * group, 2 * num_kv_heads + num_heads, head_dim, generator=rows).to(device, dtype)
    key, value, query = keys.split([num_kv_heads, num_kv_heads, num_heads], 1)
    slopes = torch.full((num_heads,), 0.01, device=device)
    # A request, and a row of padding.
    table = torch.zeros(2, num_pages, dtype=torch.int32, device=device)
    table[0] = torch.arange(1, num_pages + 1, dtype=torch.int32, device=device)
    starts = torch.arange(3, dtype=torch.int32, device=device)
    # The graph writes a page of its own; the request's pages are filled before.
    slots = torch.arange(group, (num_pages + 1) * group, device=device)
    own_slots = torch.arange((num_pages + 1) * group, (num_pages + 2) * group, device=device)
    num_tokens = torch.zeros(2, dtype=torch.int32, device=device)
    shape = (num_pages + 2, num_kv_heads, group, slot_elements(head_dim, dtype))
    caches = torch.zeros(2, *shape, dtype=dtype, device=device)
    outputs = torch.zeros(2, 2, num_heads, head_dim, dtype=dtype, device=device)

    def run(number: int) -> None:
        cache = caches[number]
        append_kv_(cache, key[:group], value[:group], own_slots)
        merge_groups_(cache, table, num_tokens, head_dim, config)
        output, _, _ = merged_attention(query[:2], cache, table, num_tokens, starts, slopes, slopes, 1, config)
        outputs[number].copy_(output)

    for cache in caches:
        append_kv_(cache, key, value, slots)
    replay = capture(functools.partial(run, 0))
    differing = []
    for length in lengths:
        num_tokens[0] = length
        outputs.fill_(float("nan"))
        replay()
        run(1)
        if not (_same(caches) and _same(outputs)):
            differing.append(length)
    return differing


def _same(two: Tensor) -> bool:
    first, second = two.contiguous().view(torch.uint8)
    return torch.equal(first, second)
