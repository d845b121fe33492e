"""Captured draft loops: one graph for each padded batch size, replayed on buffers that stay where they are."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qm_spec.drafter.loops.paged import DraftInputs, PagedLoop

logger = logging.getLogger(__name__)

# Runs a function so that its work is recorded, and returns what repeats the work on the same memory.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True)
class _Buffers:
    """Memory of all graphs of one kind, as long as the largest batch."""

    inputs: DraftInputs
    ids: Tensor
    probs: Tensor


class DraftGraphs:
    """Drafts by replaying graphs, and by the loop itself where there is none.

    A graph is captured when a batch of its size comes first. If that fails, a warning says so once, and
    from then on the loop runs without graphs.

    Args:
        capture: records and returns what replays.
        sizes: batch sizes to capture. A batch is padded to the next one; larger ones run without a graph.

    Attributes:
        num_replays: drafts by a graph so far.
    """

    def __init__(self, capture: Capture, sizes: Iterable[int]) -> None:
        self._capture = capture
        self._sizes = sorted(sizes)
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._buffers: dict[Hashable, _Buffers] = {}
        self._addresses: tuple[int, ...] = ()
        self.num_replays = 0

    def draft(self, loop: PagedLoop, inputs: DraftInputs, num_drafts: int) -> tuple[Tensor, Tensor]:
        """Draft as `PagedLoop.draft` does; what is returned is the caller's own.

        Args:
            loop: may be another one at each call; its tensors at another place end the graphs made before.
            inputs: of B requests.
            num_drafts: K, at least 1.
        """
        batch = len(inputs.num_tokens)
        number = bisect_left(self._sizes, batch)
        if number == len(self._sizes):
            return loop.draft(inputs, num_drafts)
        size = self._sizes[number]
        addresses = tuple(tensor.data_ptr() for tensor in loop.tensors)
        if addresses != self._addresses:
            self._replays.clear()
            self._addresses = addresses
        kind = (num_drafts, *((x.shape[1:], x.dtype) if x is not None else None for x in inputs))
        replay = self._replays.get((size, kind))
        if replay is None:
            try:
                replay = self._replays[size, kind] = self._record(loop, inputs, num_drafts, size, kind)
            except Exception as error:
                self._give_up(size, error)
                return loop.draft(inputs, num_drafts)
        buffers = self._buffers[kind]
        for buffer, given in zip(buffers.inputs, inputs, strict=True):
            if buffer is not None and given is not None:
                buffer[:batch].copy_(given)
        # What else the other rows hold is left over from larger batches, and means nothing.
        buffers.inputs.num_tokens[batch:size].zero_()
        replay()
        self.num_replays += 1
        return buffers.ids[:batch].clone(), buffers.probs[:batch].clone()

    def _record(
        self, loop: PagedLoop, inputs: DraftInputs, num_drafts: int, size: int, kind: Hashable
    ) -> Callable[[], None]:
        buffers = self._buffers.get(kind)
        if buffers is None:
            buffers = self._buffers[kind] = _make_buffers(loop, inputs, num_drafts, self._sizes[-1])
        # Without tokens nothing of the cache is touched while recording.
        buffers.inputs.num_tokens.zero_()
        padded = DraftInputs._make(x if x is None else x[:size] for x in buffers.inputs)

        def run() -> None:
            ids, probs = loop.draft(padded, num_drafts)
            buffers.ids[:size].copy_(ids)
            buffers.probs[:size].copy_(probs)

        return self._capture(run)

    def _give_up(self, size: int, error: Exception) -> None:
        logger.warning(
            "qm_spec: the draft loop of %d requests could not be captured in a graph (%s: %s); it runs without graphs "
            "from now on, which is slower and drafts the same",
            size,
            type(error).__name__,
            error,
        )
        self._sizes = []
        self._replays.clear()
        self._buffers.clear()


def _make_buffers(loop: PagedLoop, inputs: DraftInputs, num_drafts: int, size: int) -> _Buffers:
    zeros = (x if x is None else x.new_zeros(size, *x.shape[1:]) for x in inputs)
    num_probs = 0 if inputs.temperature is None else num_drafts
    return _Buffers(
        DraftInputs._make(zeros),
        inputs.state.new_zeros(size, num_drafts, dtype=torch.int64),
        inputs.state.new_zeros(size, num_probs, len(loop.weights.head), dtype=torch.float32),
    )
