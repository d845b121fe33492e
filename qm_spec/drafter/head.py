"""The draft head: the rows of the target's vocabulary head that a drafter reads."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qm_spec.drafter.anchors import Drafter


class DraftHead:
    """Logits of the tokens that a drafter may propose, and whose they are.

    Attributes:
        logits: the drafter's output `[..., D]` to logits `[..., Vd]`, in the head's dtype.
        token_ids: `[Vd]` int64, the target's id of each logit, rising; None where they are the whole vocabulary.
        vocab_size: V, of the target.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], token_ids: Tensor | None, vocab_size: int) -> None:
        self.logits, self.token_ids, self.vocab_size = logits, token_ids, vocab_size

    def best_tokens(self, output: Tensor) -> Tensor:
        """Return the target's ids `[...]` of the best tokens behind the drafter's output `[..., D]`."""
        rows = self.logits(output).argmax(-1)
        return rows if self.token_ids is None else self.token_ids[rows]

    def vocabulary_logits(self, output: Tensor) -> Tensor:
        """Return logits over the target's vocabulary `[..., V]`, -inf for what cannot be proposed."""
        return spread(self.logits(output), self.token_ids, self.vocab_size, float("-inf"))


def spread(values: Tensor, token_ids: Tensor | None, vocab_size: int, elsewhere: float) -> Tensor:
    """Put values of the draft vocabulary where the target's vocabulary has them.

    Args:
        values: `[..., Vd]`.
        token_ids: `[Vd]` int64; None returns the values themselves.
        vocab_size: V.
        elsewhere: the value of tokens outside.

    Returns:
        `[..., V]`, in the values' dtype.
    """
    if token_ids is None:
        return values
    return values.new_full((*values.shape[:-1], vocab_size), elsewhere).index_copy_(-1, token_ids, values)


def draft_head(drafter: Drafter, target: PreTrainedModel) -> DraftHead:
    """Return the head of a drafter that stands on a transformers model; make it once, it may gather rows.

    The rows are the target's own, but of an EAGLE-3 checkpoint with a draft vocabulary, which stores them.

    Args:
        drafter: `QuickMergePrior` or `Eagle3Drafter`.
        target: a causal LM.
    """
    head, token_ids = target.get_output_embeddings(), drafter.draft_token_ids
    rows = _target_logits(head, token_ids)
    own = getattr(drafter, "lm_head", None)
    if own is not None:
        rows = own
    dtype = (head if own is None else own).weight.dtype
    return DraftHead(lambda output: rows(output.to(dtype)), token_ids, head.weight.shape[0])


def _target_logits(head: nn.Module, token_ids: Tensor | None) -> Callable[[Tensor], Tensor]:
    if token_ids is None:
        return head
    if type(head) is not nn.Linear:
        # A quantised or wrapped head has no rows to take.
        return lambda output: head(output)[..., token_ids]
    weight, bias = head.weight[token_ids], None if head.bias is None else head.bias[token_ids]
    return lambda output: F.linear(output, weight, bias)
