"""Whether the drafter's attention and its draft loop may be captured in CUDA graphs under this engine."""

from __future__ import annotations

import functools
from bisect import bisect_left

import torch
from vllm.config import CUDAGraphMode, VllmConfig

from qm_spec.config import MergeConfig
from qm_spec.drafter.loops.cuda_graph import CudaCapture, operators_replay
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.ops import backend

# Rows times draft vocabulary of the largest captured batch: its logits take 32 MiB in float32, and what is kept of a
# sampled batch K times that. vLLM has shared out the memory before, and in larger batches launches do not matter.
MOST_LOGITS = 2**23


def can_capture(vllm_config: VllmConfig) -> bool:
    """Tell whether the operators hold in a CUDA graph: with compiled kernels, after a try on this very GPU."""
    if vllm_config.device_config.device_type != "cuda" or backend.backend("cuda") != "compiled":
        return False
    config = _config(vllm_config)
    shards = vllm_config.parallel_config.tensor_parallel_size
    num_heads, num_kv_heads = config.num_attention_heads // shards, max(1, config.num_key_value_heads // shards)
    return _tried(vllm_config.model_config.dtype, num_heads, num_kv_heads, config.head_dim, config.merge)


def _config(vllm_config: VllmConfig) -> QuickMergeConfig:
    wrapped = vllm_config.speculative_config.draft_model_config.hf_config
    return QuickMergeConfig.from_dict(wrapped.model.to_dict())


@functools.cache
def _tried(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, merge: MergeConfig) -> bool:
    return operators_replay(CudaCapture(), "cuda", dtype, num_heads, num_kv_heads, head_dim, merge)


def graph_sizes(vllm_config: VllmConfig) -> list[int]:
    """Return the batch sizes to capture the draft loop for: those vLLM captures, none where nothing is captured."""
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE) or not can_capture(vllm_config):
        return []
    most = MOST_LOGITS // _config(vllm_config).draft_vocab_size
    sizes = sorted(size for size in compilation.cudagraph_capture_sizes if size <= most)
    # One that holds the largest batch is enough.
    return sizes[: bisect_left(sizes, vllm_config.scheduler_config.max_num_seqs) + 1]
