"""Seeds of requests whose prompts are read in pieces, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from qm_spec.integrations.vllm_plugin.compat import Patch
from qm_spec.integrations.vllm_plugin.seeds import without_seeds_of_unread_prompts


def with_seeds_of_read_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the runner's `sample_tokens` that draws nothing from the seed of a request whose prompt is being read."""

    @wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        with without_seeds_of_unread_prompts(self):
            return original(self, grammar_output)

    return sample_tokens


CPU_SEEDS = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
    parameters=("self", "grammar_output"),
    replacement=with_seeds_of_read_prompts,
    why="a request with a seed may have a long prompt on a CPU, and has the same sample however it is read",
    how="hides the generators of requests whose prompts are read in pieces until the last piece; vLLM draws and takes "
    "the draw back, which ends the engine on a CPU. Applied when our model is built, and by our benchmarks",
    upstream="none",
    delete_when="vLLM does not turn back a CPU's generators",
)
