"""Operators of QuickMerge++ and of the merged cache: one file each, with checks, schema, fake and reference.

Compiled kernels, where they were built, take the references' place: see `qm_spec.ops.backend`.

Letters used in every shape: B requests, N tokens, T rows of a flattened batch, K drafted tokens,
D hidden, V vocabulary, H query heads, G key/value heads, d head size, P tokens per page,
M tokens per merge group, R entries kept per group, E entries attended, L levels.
"""

from qm_spec.ops import backend
from qm_spec.ops.append_kv import append_kv_
from qm_spec.ops.append_states import append_states_
from qm_spec.ops.attention_entropy import attention_entropy
from qm_spec.ops.cosine_similarity import cosine_similarity
from qm_spec.ops.draft_tokens import draft_tokens
from qm_spec.ops.gumbel_softmax import gumbel_softmax
from qm_spec.ops.masked_attention_entropy import masked_attention_entropy
from qm_spec.ops.merge_groups import merge_groups_
from qm_spec.ops.merged_attention import merged_attention
from qm_spec.ops.saliency_merge import saliency_merge
from qm_spec.ops.weighted_kmeans import weighted_kmeans_assign, weighted_kmeans_update

__all__ = [
    "append_kv_",
    "append_states_",
    "attention_entropy",
    "cosine_similarity",
    "draft_tokens",
    "gumbel_softmax",
    "masked_attention_entropy",
    "merge_groups_",
    "merged_attention",
    "saliency_merge",
    "weighted_kmeans_assign",
    "weighted_kmeans_update",
]

backend.load()
