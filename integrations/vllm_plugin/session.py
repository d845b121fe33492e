"""Drafting for one engine in one call, on a GPU in one graph, and what it has learnt of the engine's requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from qm_spec.drafter.controller import Controller
from qm_spec.drafter.head import spread
from qm_spec.drafter.loops.cuda_graph import CudaCapture
from qm_spec.drafter.loops.gathered import DraftLoop, dense_weights, state_weights
from qm_spec.drafter.loops.graphs import DraftGraphs
from qm_spec.drafter.loops.paged import DraftInputs, PagedLoop, draw
from qm_spec.drafter.suffix_index import Lookup
from qm_spec.integrations.vllm_plugin.adaptive import begin_step, make_controller, plan_step
from qm_spec.integrations.vllm_plugin.counters import Counters
from qm_spec.integrations.vllm_plugin.cuda_graphs import graph_sizes
from qm_spec.integrations.vllm_plugin.lookup import draft_widths, join_drafts, look_up
from qm_spec.integrations.vllm_plugin.report import Report
from qm_spec.integrations.vllm_plugin.seeds import next_numbers
from qm_spec.integrations.vllm_plugin.seeds import sample as sample_by_number
from qm_spec.integrations.vllm_plugin.sharing import group_of, make_responses
from qm_spec.integrations.vllm_plugin.step import DraftRequest, DraftStep
from qm_spec.integrations.vllm_plugin.switch import Switch, limit_drafts
from qm_spec.integrations.vllm_plugin.target_head import plain_head, plain_table, table_sources
from qm_spec.ops import append_states_, backend, merge_groups_
from qm_spec.ops.append_states import StateWeights
from qm_spec.ops.draft_layer import in_half_the_bytes
from qm_spec.ops.draft_tokens import LEAST_TEMPERATURE, DraftWeights, draft_tokens

logger = logging.getLogger("vllm.plugins.qm_spec")

# In larger batches the library multiplies 16-bit weights faster than the operator (benchmarks/bench_kernels.py).
MOST_REQUESTS_16_BIT = 16
# Rows of a step that the operator reads; those of a prompt are multiplied by the library.
MOST_ROWS = 64
# Steps in a row in which drafting may fail. A fault that passes costs the drafts of a step; one that stays would fill
# the log.
MOST_FAILURES = 3

Drafted = TypeVar("Drafted")


def plain_weights(model: Any) -> DraftWeights | None:
    """Return the weights of a drafter whose target has plain ones, None where vLLM's own layers must draft.

    Of the target's head only the rows of the draft vocabulary are there.

    Args:
        model: the drafter, with the target's embedding and head in place.
    """
    embedding, head, rows = plain_table(model, model.model.embed_tokens), plain_head(model), model.draft_rows
    if embedding is None or head is None:
        return None
    if rows is None:
        return dense_weights(model.model.layer, embedding, head)
    return dense_weights(model.model.layer, embedding, rows.gather(head), rows.token_ids)


def has_cpu_kernels(tensor: Tensor) -> bool:
    """Whether the compiled operators of a CPU read a tensor."""
    return tensor.device.type == "cpu" and backend.backend("cpu") == "compiled"


class PlainWeights(NamedTuple):
    """Of a drafter whose target has plain ones: what the operators read tokens with, and what they draft with."""

    reading: StateWeights
    drafting: DraftWeights


class Drafts(NamedTuple):
    """What was drafted behind one step.

    Attributes:
        token_ids: `[B, W]` int64 where all requests have W, else a list for each.
        probs: `[B, W, V]` distributions that they were drawn from, for the widest request; None where they are sure.
    """

    token_ids: Tensor | list[list[int]]
    probs: Tensor | None


class DraftSession:
    """The drafter of one engine.

    Args:
        model: `QuickMergeForCausalLM`.
        vllm_config: for the sizes of CUDA graphs, which vLLM settles after the model is made.
        num_drafts: the most tokens that the prior drafts.
        most_drafts: the most tokens of a request; lookup may draft more than the prior.
        lookup_length: shortest suffix to look up, in tokens, 0 for none.
        adapts: whether no more is drafted than pays, on a CPU.
        seeds_by_position: whether a seed's sample is the same whatever is drafted.

    Attributes:
        batch: requests of the last step, row by row; none at all where vLLM does not tell.
        num_failures: steps in a row in which drafting has failed.
        switch: what may be drafted.
        counters: what has been drafted, and accepted.
        report: tells about them.
        responses: of finished requests, to copy from; None where nothing is shared.
        captures: whether the V2 runner's speculator captures our loop; None where the speculator is not ours.
    """

    def __init__(
        self,
        model: Any,
        vllm_config: Any,
        num_drafts: int,
        most_drafts: int,
        *,
        lookup_length: int = 0,
        adapts: bool = False,
        seeds_by_position: bool = False,
    ) -> None:
        self.model, self.vllm_config = model, vllm_config
        self.num_drafts, self.most_drafts = num_drafts, most_drafts
        self.lookup_length, self.adapts, self.seeds_by_position = lookup_length, adapts, seeds_by_position
        self.batch: list[DraftRequest] = []
        self.num_failures = 0
        self.switch = Switch(most_drafts)
        self.counters = Counters()
        self.report = Report(self.counters, "the drafter")
        self.captures: bool | None = None
        self.responses = make_responses(lookup_length)
        self._requests: dict[str, DraftRequest] = {}
        # The last step's requests, and the rows of steps that are not read yet: states, following tokens and slots.
        self._last_batch: list[DraftRequest] = []
        self._unread: list[tuple[Tensor, Tensor, Tensor]] = []
        self._plain: tuple[tuple[Any, ...], PlainWeights | None] | None = None

    @property
    def failed(self) -> bool:
        """Whether drafting has failed so often that it is over."""
        return self.num_failures >= MOST_FAILURES

    @cached_property
    def graphs(self) -> DraftGraphs | None:
        """The draft graphs, made at the first step; None on a CPU."""
        on_gpu = self.vllm_config.device_config.device_type == "cuda"
        return DraftGraphs(CudaCapture(), graph_sizes(self.vllm_config)) if on_gpu else None

    def _weights(self) -> PlainWeights | None:
        """Return what the operators read and draft with, None where vLLM's own layers must."""
        sources = table_sources(self.model)
        if self._plain is None or self._plain[0] != sources:
            drafting = plain_weights(self.model)
            plain = None
            if drafting is not None:
                reading = state_weights(self.model.model.layer, drafting.embedding)
                if has_cpu_kernels(drafting.embedding):
                    # Half the bytes are half their time. The reference would widen them again at each step.
                    reading, drafting = in_half_the_bytes(reading), in_half_the_bytes(drafting)
                plain = PlainWeights(reading, drafting)
            self._plain = sources, plain
        return self._plain[1]

    @cached_property
    def controller(self) -> Controller:
        """What decides how many tokens to draft."""
        return make_controller(self.num_drafts, self.most_drafts if self.lookup_length else 0)

    def turn(self, on: bool) -> None:
        """Draft from now on, or no longer: pages are still written, so that drafts are as good as ever afterwards."""
        self.switch.on = on
        # It would take what happened in between for one step.
        self.__dict__.pop("controller", None)

    def note_batch(self, names: Sequence[str], states: Mapping[str, Any]) -> None:
        """Note the requests of the next step to draft behind, and forget those that vLLM has forgotten.

        Args:
            names: of the batch, row by row.
            states: by name, vLLM's states of all its requests.
        """
        known, self._requests = self._requests, {}
        for name, request in known.items():
            if states.get(name) is request.state:
                self._requests[name] = request
            elif self.responses is not None and request.group is not None:
                self.responses.add(request.group, request.answer)
        for name in names:
            if name not in self._requests:
                self._requests[name] = request = DraftRequest(states[name])
                request.most_drafts = self.switch.most_tokens(request.asked)
                request.group = None if self.responses is None else group_of(request)
        self.batch = [self._requests[name] for name in names]

    def attempt(self, draft: Callable[[], Drafted]) -> Drafted | None:
        """Return what `draft` returns, None where it raises: decoding needs no drafts.

        After `MOST_FAILURES` steps in a row it is not called again. What the pages lack of a failed step costs
        acceptance only: readers trust no page, and merging drops what is not finite.
        """
        if self.failed:
            self._note_failed_step()
            return None
        try:
            drafted = draft()
        except Exception:
            self.num_failures += 1
            self._forget()
            logger.warning(
                "qm_spec: drafting failed, so %s. Outputs stay right; please report what follows",
                f"after {MOST_FAILURES} steps in a row this engine goes on without drafts; start it again to draft"
                if self.failed
                else "this step goes on without drafts",
                exc_info=True,
            )
            self._note_failed_step()
            return None
        self.num_failures = 0
        self.report.end_step()
        return drafted

    def _note_failed_step(self) -> None:
        self.counters["failed_steps", ""] += 1
        self.report.end_step()

    def _forget(self) -> None:
        """Drop what a step that failed may have left half noted: indices are made anew, and costs measured anew."""
        self._requests.clear()
        self._unread.clear()
        self.__dict__.pop("controller", None)

    def draft(self, step: DraftStep) -> Drafts | None:
        """Decide how many tokens to draft behind this step, write its states into the merged cache and draft.

        Returns:
            None where drafting is switched off.
        """
        on_cpu = step.next_token_ids.device.type == "cpu"
        if on_cpu and self._rests(step):
            self._put_off(step)
            self.counters["steps", "plain"] += 1
            return Drafts([[] for _ in step.requests], None)
        if on_cpu or self.lookup_length:
            # Lookup reads values on the host too.
            self._count_verified(step)
        if not self.switch.on:
            self.counters["steps", "plain"] += 1
            self.propose(step, [0] * len(step.next_token_ids))
            return None
        controller = self.controller if self.adapts and on_cpu and step.requests else None
        if controller is not None:
            begin_step(controller, step)
        # A request's own seed must give the same text again, and each draft takes random numbers from it.
        repeatable = bool(step.generators) and not self.seeds_by_position
        found: Sequence[Lookup] = look_up(step, self.lookup_length, None if repeatable else self.responses)
        num_requests, num_drafts = len(step.next_token_ids), min(step.num_drafts, self.num_drafts)
        widths: Sequence[int]
        if repeatable:
            widths = [num_drafts] * num_requests
            controller = None
        elif controller is not None:
            widths, found = plan_step(controller, step, found)
        else:
            widths = draft_widths(found, num_requests, num_drafts)
            if on_cpu and step.requests:
                # A GPU drafts as many for all.
                widths, found = limit_drafts(step.requests, widths, found)
        drafts = self.propose(step, widths, found)
        self._count_drafted(step, widths, found)
        if controller is not None:
            controller.end()
        return drafts

    def _rests(self, step: DraftStep) -> bool:
        """Tell whether nothing is drafted behind this step without a look at it, and its rows can be read later."""
        before, self._last_batch = self._last_batch, list(step.requests)
        size = len(before)
        if not size or len(step.requests) != size or int(step.query_start_loc[-1]) != size:
            return False
        if any(one is not other or one.source for one, other in zip(step.requests, before, strict=True)):
            # Others, or some whose drafts are to be counted.
            return False
        if not self.switch.on:
            return True
        by_seed = step.generators and not self.seeds_by_position
        return self.adapts and not by_seed and self.controller.rests()

    def _put_off(self, step: DraftStep) -> None:
        """Keep what the rows of a step say: those of several steps take hardly longer to read than those of one.

        The batch has not changed since the last step that was read, so nobody else has been given these slots.
        """
        if sum(len(states) for states, _, _ in self._unread) + len(step.states) > MOST_ROWS:
            self._catch_up()
        slots = step.slot_mapping[: len(step.states)].clone()
        self._unread.append((step.states, step.next_token_ids.to(step.token_ids.dtype), slots))

    def _catch_up(self) -> None:
        """Read what was put off, before anything else is written."""
        if self._unread:
            states, token_ids, slots = (torch.cat(parts) for parts in zip(*self._unread, strict=True))
            self._unread.clear()
            self._remember(states, token_ids, slots, self.model.model.attn.kv_cache)

    def _count_verified(self, step: DraftStep) -> None:
        """Count what this step has verified of the drafts that were made behind the one before."""
        if not step.requests:
            return
        rows, rejected = step.query_start_loc.diff().tolist(), step.num_rejected.tolist()
        for request, num_rows, num_rejected in zip(step.requests, rows, rejected, strict=True):
            # A preempted request has more rows: it is read again, and its draft is lost.
            if request.source is not None and 1 < num_rows <= 1 + request.num_drafted:
                num_drafted = num_rows - 1
                self.counters.note_drafts(request.source, 1, num_drafted, num_drafted - num_rejected)
            request.source = None

    def _count_drafted(self, step: DraftStep, widths: Sequence[int], found: Sequence[Lookup]) -> None:
        """Count the step by what has drafted behind it, and note whose draft each request waits with."""
        sources = [
            None if not width else "lookup" if found and found[row].length else "prior"
            for row, width in enumerate(widths)
        ]
        self.counters["steps", "prior" if "prior" in sources else "lookup" if "lookup" in sources else "plain"] += 1
        if not step.requests:
            return
        for request, source, width, num_computed in zip(
            step.requests, sources, widths, step.num_verified.tolist(), strict=True
        ):
            # Behind a piece of a prompt vLLM drops the drafts.
            request.source = source if request.num_written(num_computed) > 0 else None
            request.num_drafted = width

    def read(self, step: DraftStep, cache: Tensor) -> Tensor:
        """Write the keys and values of this step's tokens into the merged cache and return their fused states `[T, D]`.

        Args:
            step: of T tokens.
            cache: `[pages, G, P, C]`, changed in place.
        """
        self._catch_up()
        return self._remember(step.states, step.following_token_ids, step.slot_mapping[: len(step.states)], cache)

    def _remember(self, aux_states: Tensor, token_ids: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        """Write the keys and values of T tokens, of their states and of what follows them; return `[T, D]`."""
        model, layer, plain = self.model, self.model.model.layer, self._weights()
        if plain is not None and has_cpu_kernels(aux_states) and len(aux_states) <= MOST_ROWS:
            eps, norm = layer.norm.eps, layer.norm_aux_states
            return append_states_(cache, aux_states, token_ids, slots, plain.reading, eps, norm_aux_states=norm)
        states: Tensor = model.combine_hidden_states(aux_states)
        loop = DraftLoop(layer, model.model.embed_tokens, model.compute_logits, model.config.merge)
        loop.remember(cache, states, token_ids, slots)
        return states

    def propose(self, step: DraftStep, widths: Sequence[int], found: Sequence[Lookup] = ()) -> Drafts:
        """Write this step's states into the merged cache and draft from it.

        Args:
            step: of B requests.
            widths: tokens to draft for each request; the prior drafts as many for all as the most of those without a
                lookup. 0 for all still writes the cache.
            found: what suffix lookup drafts for each request; empty where it is off.
        """
        model = self.model
        layer, merge, cache = model.model.layer, model.config.merge, model.model.attn.kv_cache
        loop = DraftLoop(layer, model.model.embed_tokens, model.compute_logits, merge)

        states, rows, next_ids = self.read(step, cache), step.last_rows.long(), step.next_token_ids
        seeded = step.generators or {} if step.draws else {}
        num_drafts = max((width for row, width in enumerate(widths) if not (found and found[row].length)), default=0)
        if seeded and not self.seeds_by_position:
            # The same sample again only if every step takes as many numbers from the seed.
            num_drafts = min(widths)
        if num_drafts == 0:
            # A later step merges what this one leaves. Without distributions drafts count as sure.
            nothing = next_ids.new_empty((len(next_ids), 0), dtype=torch.int64)
            return Drafts(join_drafts(found, nothing, None, widths)[0], None)
        state, table, verified = states[rows], step.block_table, step.num_verified

        plain = self._weights()
        weights = None if plain is None else plain.drafting
        if self.graphs is None and len(state) > MOST_REQUESTS_16_BIT and state.dtype.itemsize == 2:
            weights = None
        temperature = uniform = None
        if step.draws and step.temperature is not None:
            temperature = step.temperature
            uniform = _random_numbers({} if self.seeds_by_position else seeded, state.new_empty(len(state), num_drafts))
        numbers, distributed = None, True
        if temperature is not None and seeded and self.seeds_by_position:
            # The operator draws by other numbers.
            weights, seeded_rows = None, list(seeded)
            numbers = torch.stack([next_numbers(generator, num_drafts) for generator in seeded.values()])
            # Drafts of a position's number are verified by that number, so distributions, which take many times as
            # long, are for sampled requests without a seed.
            distributed = bool((temperature >= LEAST_TEMPERATURE).sum() > len(seeded))
        with torch.inference_mode():
            probs: Tensor | None
            if weights is None:
                step_probs: list[Tensor] = []
                columns = iter(range(num_drafts))

                def sample(logits: Tensor) -> Tensor:
                    if temperature is None or uniform is None:
                        return logits.argmax(-1)
                    column = next(columns)
                    if distributed:
                        token_ids, distribution = draw(logits, temperature, uniform[:, column])
                        step_probs.append(distribution)
                    else:
                        token_ids = logits.argmax(-1)
                    if numbers is not None:
                        own = logits[seeded_rows].float() / temperature[seeded_rows].unsqueeze(-1)
                        token_ids[seeded_rows] = sample_by_number(own, numbers[:, column])
                    return token_ids

                drafted = loop.draft(cache, table, verified, state, next_ids, num_drafts, sample)
                probs = torch.stack(step_probs, dim=1) if step_probs else None
            else:
                eps = layer.norm.eps
                if self.graphs is not None:
                    paged = PagedLoop(weights, eps, cache, merge)
                    inputs = DraftInputs(table, verified, state, next_ids, temperature, uniform)
                    drafted, probs = self.graphs.draft(paged, inputs, num_drafts)
                    self.counters["graph_replays", ""] = self.graphs.num_replays
                else:
                    merge_groups_(cache, table, verified, layer.head_dim, merge)
                    drafted, probs = draft_tokens(
                        cache, table, verified, state, next_ids, weights, num_drafts, eps, merge, temperature, uniform
                    )
                # What verifies drafts knows the target's vocabulary only.
                if step.draws and model.draft_rows is not None:
                    probs = spread(probs, weights.token_ids, model.config.vocab_size, 0.0)
            if step.draws and probs is not None:
                _make_sure(probs, drafted)
            return Drafts(*join_drafts(found, drafted, probs if step.draws else None, widths))


def _make_sure(probs: Tensor, drafted: Tensor) -> None:
    """Call drafts sure, in place, whose distribution `[B, K, V]` is not finite: verification must not weigh by it.

    Such are those of a request that has read what is not finite, until its window has moved on.
    """
    places = drafted.unsqueeze(-1)
    # A distribution with one NaN in it is all NaN.
    broken = ~probs.gather(-1, places).isfinite()
    # The host reads a CPU's values for nothing; elsewhere it would wait.
    if probs.device.type != "cpu" or broken.any():
        probs.masked_fill_(broken, 0.0).scatter_add_(-1, places, broken.to(probs.dtype))


def _random_numbers(generators: Mapping[int, torch.Generator], like: Tensor) -> Tensor:
    """Return float64 numbers in 0..1, shape `[B, K]`; those of rows with a generator come from that."""
    uniform = torch.rand_like(like, dtype=torch.float64)
    for row, generator in generators.items():
        uniform[row] = torch.rand(like.shape[1:], dtype=torch.float64, device=like.device, generator=generator)
    return uniform
