"""What a draft step reads of vLLM: its objects' names are known here and in the adapters, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qm_spec.drafter.suffix_index import SuffixIndex


@dataclass(eq=False)
class DraftRequest:
    """A request, from the first step that drafts for it until vLLM forgets it.

    Attributes:
        state: the V1 runner's `CachedRequestState`.
        index: of its tokens, made by the first lookup.
        source: of the draft that the target verifies next, `prior` or `lookup`; None where it has none.
        num_drafted: tokens of that draft.
        most_drafts: tokens that it lets a step draft.
        group: whose past answers it may copy from, and adds its own to; None for nobody's.
    """

    state: Any
    index: SuffixIndex | None = None
    source: str | None = None
    num_drafted: int = 0
    most_drafts: int = sys.maxsize
    group: str | None = None

    @property
    def asked(self) -> object:
        """What it says of drafting for it, see `switch.py`; None for nothing."""
        return self._extra_argument("qm_spec")

    @property
    def shares(self) -> object:
        """What it says of sharing answers, see `sharing.py`; None for nothing."""
        return self._extra_argument("qm_spec_share")

    @property
    def adapter(self) -> int:
        """The number of its LoRA adapter, 0 for none."""
        return self.state.lora_request.lora_int_id if self.state.lora_request else 0

    @property
    def answer(self) -> list[int]:
        """The tokens sampled for it, without those that have not arrived."""
        return [token for token in self.state.output_token_ids if token >= 0]

    def _extra_argument(self, name: str) -> object:
        given = getattr(self.state.sampling_params, "extra_args", None)
        return given.get(name) if given else None

    def token_ids(self, start: int, end: int) -> list[int] | None:
        """Return its tokens as vLLM knows them; None for embeddings, and before sampled ones have arrived."""
        if self.state.prompt_token_ids is None:
            return None
        token_ids = [self.state.get_token_id(position) for position in range(start, end)]
        return None if min(token_ids) < 0 else token_ids

    def num_written(self, num_computed: int) -> int:
        """Return how many tokens have been sampled for it, 0 or less while its prompt is read.

        Args:
            num_computed: its verified tokens in the cache; one more has been sampled.
        """
        return num_computed + 1 - int(self.state.num_prompt_tokens)

    def num_useful(self, num_computed: int) -> int:
        """Return how many drafts it can still use: none while its prompt is read, none of its last token, as it asks.

        Args:
            num_computed: its verified tokens in the cache; one more has been sampled.
        """
        num_written = self.num_written(num_computed)
        most = self.state.sampling_params.max_tokens
        if num_written < 1:
            return 0
        return self.most_drafts if most is None else min(self.most_drafts, max(most - num_written - 1, 0))


@dataclass(frozen=True)
class DraftStep:
    """One step of the target, behind which is drafted: T rows of B requests, one request after the other.

    Attributes:
        num_drafts: K, the most tokens to draft for a request.
        token_ids: `[T]` that the target has read, rejected drafts included.
        states: `[T, 3 D]`, its auxiliary states of these.
        next_token_ids: `[B]`, the token behind each request's last verified one.
        last_rows: `[B]`, rows of the last verified tokens.
        query_start_loc: `[B + 1]` int32, where each request's rows begin.
        seq_lens: `[B]` int32, its tokens in the cache, rejected drafts included.
        num_rejected: `[B]` int32, drafts of this step that were rejected.
        block_table: `[B, columns]` int32, of the draft layer's cache group.
        slot_mapping: `[T]` int64 or more, likewise.
        draws: whether drafts are drawn from distributions, which verification must then know.
        temperature: `[B]` float32, None where all requests are greedy.
        generators: of requests with a seed, by row. While drafts are made it lacks those whose prompts are being read.
        requests: B of them; none at all where they are not known.
    """

    num_drafts: int
    token_ids: Tensor
    states: Tensor
    next_token_ids: Tensor
    last_rows: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    num_rejected: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    draws: bool = False
    temperature: Tensor | None = None
    generators: Mapping[int, torch.Generator] | None = None
    requests: Sequence[DraftRequest] = ()

    @property
    def num_verified(self) -> Tensor:
        """Tokens in the cache that no rejection can take back, `[B]` int32."""
        return self.seq_lens - self.num_rejected

    @property
    def following_token_ids(self) -> Tensor:
        """The token after each one that was read, `[T]`; what follows a rejected one does not matter."""
        next_ids = self.next_token_ids.to(self.token_ids.dtype)
        return self.token_ids.roll(-1).index_put((self.last_rows.long(),), next_ids)

    @classmethod
    def from_v1(
        cls,
        proposer: Any,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: Any,
        sampling_metadata: Any,
        num_rejected_tokens: Tensor | None,
        requests: Sequence[DraftRequest],
    ) -> DraftStep:
        """Make the step of what the V1 runner hands to a proposer's `propose`.

        Args:
            proposer: vLLM's EAGLE proposer.
            num_speculative_tokens: K.
            target_token_ids: `[T]`.
            target_hidden_states: `[T, 3 D]`.
            next_token_ids: `[B]`.
            token_indices_to_sample: `[B]` rows of the last verified tokens; the last rows when None.
            common_attn_metadata: of the draft layer's cache group.
            sampling_metadata: of the batch.
            num_rejected_tokens: `[B]`, None where nothing was drafted.
            requests: what the session knows of the batch.
        """
        common, sampling = common_attn_metadata, sampling_metadata
        starts, lengths, last_rows = common.query_start_loc, common.seq_lens, token_indices_to_sample
        rejected = torch.zeros_like(lengths) if num_rejected_tokens is None else num_rejected_tokens
        if requests and next_token_ids.device.type == "cpu":
            next_token_ids = _known_next_tokens(next_token_ids, lengths - rejected, requests)
        return cls(
            num_drafts=num_speculative_tokens,
            token_ids=target_token_ids,
            states=target_hidden_states,
            next_token_ids=next_token_ids,
            last_rows=starts[1:] - 1 if last_rows is None else last_rows,
            query_start_loc=starts,
            seq_lens=lengths,
            num_rejected=rejected,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            draws=proposer._enable_probabilistic_draft_probs and not sampling.all_greedy,  # noqa: SLF001 - vLLM's
            temperature=None if sampling.all_greedy else sampling.temperature,
            generators=sampling.generators,
            requests=requests,
        )

    @classmethod
    def from_v2(
        cls,
        num_speculative_tokens: int,
        input_batch: Any,
        layer_metadata: Any,
        aux_hidden_states: Sequence[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
    ) -> DraftStep:
        """Make the step of what the V2 runner hands to a speculator's `propose`, without a value read on the host.

        How drafts are drawn is left to vLLM's own sampling.

        Args:
            num_speculative_tokens: K.
            input_batch: the target's batch.
            layer_metadata: our attention layer's `QuickMergeMetadata` of the target's step; None in dummy runs.
            aux_hidden_states: three times `[T, D]` or more rows.
            num_sampled: `[B]`, 0 where a prompt is still being read.
            num_rejected: `[B]`.
            last_sampled: `[R, 1]` by the place of a request's state.
            next_prefill_tokens: `[n, R]`, likewise.

        Raises:
            ValueError: the target hands out no auxiliary states.
        """
        if not aux_hidden_states:
            raise ValueError("qm_spec: the V2 runner gave no auxiliary states of the target")
        num_tokens, places = input_batch.num_tokens, input_batch.idx_mapping
        # Behind these there may be padding.
        starts, lengths = input_batch.query_start_loc[: len(places) + 1], input_batch.seq_lens[: len(places)]
        of_prompt = next_prefill_tokens[0, places].to(last_sampled.dtype)
        if layer_metadata is None:
            # All rows are padding then.
            table = places.new_zeros((len(places), 1), dtype=torch.int32)
            slots = places.new_full((num_tokens,), -1)
        else:
            table, slots = layer_metadata.block_table[: len(places)], layer_metadata.slot_mapping[:num_tokens]
        return cls(
            num_drafts=num_speculative_tokens,
            token_ids=input_batch.input_ids[:num_tokens],
            states=torch.cat([states[:num_tokens] for states in aux_hidden_states], dim=-1),
            next_token_ids=torch.where(num_sampled > 0, last_sampled.flatten()[places], of_prompt),
            last_rows=starts[1:] - 1 - num_rejected,
            query_start_loc=starts,
            seq_lens=lengths,
            num_rejected=num_rejected,
            block_table=table,
            slot_mapping=slots,
        )


def _known_next_tokens(named: Tensor, num_verified: Tensor, requests: Sequence[DraftRequest]) -> Tensor:
    """Return the token behind each request's last verified one `[B]`, also where a prompt is read in pieces.

    There the V1 runner names the prompt's last token behind every piece, and the memory would tell that for good. This
    reads values on the host, for which a GPU's step would be waited for.
    """
    token_ids = named.tolist()
    for row, (request, position) in enumerate(zip(requests, num_verified.tolist(), strict=True)):
        known = request.token_ids(position, position + 1)
        if known is not None:
            (token_ids[row],) = known
    return named.new_tensor(token_ids)
