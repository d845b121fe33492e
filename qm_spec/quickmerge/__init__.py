"""QuickMerge++ token compression as small modules.

Letters: L layers, B sequences, N tokens, K merged tokens (slots), D embedding. A `token_mask` is
`[B, N]` bool, True at tokens and False at padding, which may stand anywhere; None means no padding.

Source: QuickMerge++, arXiv 2508.13204, and the two READMEs behind it: `quickmerge` and `quickmergepp`.
"""

from qm_spec.quickmerge.alignment import BidirectionalARAlignment
from qm_spec.quickmerge.ar_prior import AutoregressivePrior, PriorCache
from qm_spec.quickmerge.budget import effective_tokens, entropy_budget, fixed_budget, ratio_budget
from qm_spec.quickmerge.facade import QuickMergePP, quickmerge_inference
from qm_spec.quickmerge.fidelity import NormBasedFidelityConstraint, norm_mass_retained, normalised_entropy_drop
from qm_spec.quickmerge.grouping import Grouping, group_by_cosine, group_by_kmeans
from qm_spec.quickmerge.merging import DifferentiableTokenMerging, MergedTokens, merge_groups, unmerge
from qm_spec.quickmerge.saliency import EntropyAwareSaliency, LearnedSaliency, NormSaliency
from qm_spec.quickmerge.selection import Selection, TemperatureSchedule, TokenSelection

__all__ = [
    "AutoregressivePrior",
    "BidirectionalARAlignment",
    "DifferentiableTokenMerging",
    "EntropyAwareSaliency",
    "Grouping",
    "LearnedSaliency",
    "MergedTokens",
    "NormBasedFidelityConstraint",
    "NormSaliency",
    "PriorCache",
    "QuickMergePP",
    "Selection",
    "TemperatureSchedule",
    "TokenSelection",
    "effective_tokens",
    "entropy_budget",
    "fixed_budget",
    "group_by_cosine",
    "group_by_kmeans",
    "merge_groups",
    "norm_mass_retained",
    "normalised_entropy_drop",
    "quickmerge_inference",
    "ratio_budget",
    "unmerge",
]
