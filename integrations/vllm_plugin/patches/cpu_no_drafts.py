"""Steps without any draft token on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from qm_spec.integrations.vllm_plugin.compat import Patch


def with_plain_sampling(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the runner's `_sample` that verifies nothing where nothing was drafted.

    vLLM verifies the drafts of each step, also of those that have none, which takes up to three times as long as
    sampling. There it takes the largest top-k of no rows, too, which is an error.
    """

    @wraps(original)
    def sample(self: Any, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            on_cpu = logits is not None and logits.device.type == "cpu"
            return original(self, logits, None if on_cpu else spec_decode_metadata)
        return original(self, logits, spec_decode_metadata)

    return sample


CPU_NO_DRAFTS = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
    parameters=("self", "logits", "spec_decode_metadata"),
    replacement=with_plain_sampling,
    why="a step without drafts costs what it costs without a drafter, and a request with top_k and without top_p does "
    "not end the engine in it",
    how="samples such a step on a CPU as plain decoding does; applied when our model is built",
    upstream="none",
    delete_when="vLLM verifies only where something was drafted",
)
