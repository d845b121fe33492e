"""The requests of a batch for the V1 runner's drafting."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from qm_spec.integrations.vllm_plugin.compat import Patch
from qm_spec.integrations.vllm_plugin.proposer import session_of


def with_request_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's `prepare_next_token_ids_padded` that tells our session which requests the batch's rows are."""

    @wraps(original)
    def replaced(
        self: Any,
        sampled_token_ids: Tensor,
        requests: dict[str, Any],
        gpu_input_batch: Any,
        discard_request_mask: Tensor,
    ) -> Any:
        session = session_of(self)
        if session is not None:
            session.note_batch(gpu_input_batch.req_ids[: gpu_input_batch.num_reqs], requests)
        return original(self, sampled_token_ids, requests, gpu_input_batch, discard_request_mask)

    return replaced


REQUEST_STATES = Patch(
    target="vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.prepare_next_token_ids_padded",
    parameters=("self", "sampled_token_ids", "requests", "gpu_input_batch", "discard_request_mask"),
    replacement=with_request_states,
    why="suffix lookup (lookup_length), for which a request's earlier tokens must be found again, and drafting only "
    "where it pays (QM_SPEC_ADAPT), for which each request's acceptance is followed; on a CPU also the right token "
    "behind a piece of a prompt",
    how="tells our session which requests the rows are, which `propose` is not told; on a CPU, and where lookup is on",
    upstream="none",
    delete_when="vLLM tells a proposer's `propose` the requests of the batch",
)
