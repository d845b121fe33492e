"""The drafter's checkpoint configuration."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from qm_spec.config import ARCHITECTURE, MergeConfig
from qm_spec.drafter.suffix_index import MAX_LENGTH


class QuickMergeConfig(LlamaConfig):
    """Sizes of the prior and settings of its merged cache.

    It is stored with model type `llama`, so that vLLM reads a drafter folder with the config class
    it has; `architectures` says whose model it really is. The vocabulary head and the embedding
    are the target's, so `hidden_size` and `vocab_size` equal the target's. A draft vocabulary takes some rows of that
    head.

    Args:
        target_fingerprint: of the one target this drafter was trained for.
        eagle_aux_hidden_state_layer_ids: target layers whose input states are fused; vLLM's name.
        num_speculative_tokens: drafted tokens per step when the user names no number.
        norm_aux_states: bring the states to one size before they are fused; their sizes differ a thousandfold
            between the embedding (layer 0) and the last layer.
        next_token_values: a token's value says which token followed it. Then one layer can find where the newest token
            stood before and draft what followed it there.
        quickmerge: `MergeConfig` settings as a dict.
        lookup_length: in vLLM, where so many of a request's last tokens (2..8) have stood in it before, what followed
            them there is drafted in place of the prior's tokens; 0 never looks them up.
        draft_vocab_size: tokens that it can propose, see `qm_spec.drafter.vocabulary`; None for the whole vocabulary.
        **kwargs: `LlamaConfig` settings.

    Raises:
        ValueError: settings out of range or unknown.
    """

    def __init__(
        self,
        target_fingerprint: str = "",
        eagle_aux_hidden_state_layer_ids: list[int] | None = None,
        num_speculative_tokens: int = 4,
        norm_aux_states: bool = False,
        next_token_values: bool = False,
        quickmerge: dict[str, Any] | None = None,
        lookup_length: int = 0,
        draft_vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.merge = MergeConfig.from_dict(quickmerge or {})
        self.target_fingerprint = target_fingerprint
        self.eagle_aux_hidden_state_layer_ids = list(eagle_aux_hidden_state_layer_ids or [])
        self.norm_aux_states = norm_aux_states
        self.next_token_values = next_token_values
        limit = self.merge.max_speculative_tokens
        if not 1 <= num_speculative_tokens <= limit:
            raise ValueError(
                f"QuickMergeConfig: num_speculative_tokens must be in 1..{limit} for a window of "
                f"{self.merge.window}, got {num_speculative_tokens}"
            )
        self.num_speculative_tokens = num_speculative_tokens
        self.lookup_length = check_lookup_length("QuickMergeConfig: lookup_length", lookup_length)
        kwargs.setdefault("num_hidden_layers", 1)
        # Nothing in the prior depends on absolute positions; vLLM would cut drafting at a lower limit.
        kwargs.setdefault("max_position_embeddings", 1 << 20)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self.architectures = [ARCHITECTURE]
        self.draft_vocab_size = check_draft_vocab_size("QuickMergeConfig", draft_vocab_size, self.vocab_size)

    @property
    def reads_embedding(self) -> bool:
        """The first fused state is the target's embedding, brought to the size of the others."""
        return self.norm_aux_states and self.eagle_aux_hidden_state_layer_ids[:1] == [0]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `config.json`."""
        values = super().to_dict()
        merge = values.pop("merge", self.merge)
        values["quickmerge"] = merge.to_dict() if isinstance(merge, MergeConfig) else merge
        return values


def check_draft_vocab_size(name: str, size: int | None, vocab_size: int) -> int:
    """Return the size of a draft vocabulary, which is the target's where none is given.

    Raises:
        ValueError: it is out of range.
    """
    if size is not None and not 1 <= size <= vocab_size:
        raise ValueError(f"{name}: draft_vocab_size must be in 1..{vocab_size}, the target's vocabulary, got {size}")
    return vocab_size if size is None else size


def check_lookup_length(name: str, length: Any) -> int:
    """Return a lookup length that is in range.

    Args:
        name: of the setting, for the error.

    Raises:
        ValueError: it is neither 0 nor an integer in 2..8.
    """
    # One token alone tells nothing: most have stood before.
    if type(length) is not int or length not in (0, *range(2, MAX_LENGTH + 1)):
        raise ValueError(
            f"{name} must be 0 (no lookup) or in 2..{MAX_LENGTH} tokens (4 is a good start), got {length!r}"
        )
    return length
