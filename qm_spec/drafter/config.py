"""The drafter's checkpoint configuration."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from qm_spec.config import ARCHITECTURE, MergeConfig


class QuickMergeConfig(LlamaConfig):
    """Sizes of the prior and settings of its merged cache.

    It is stored with model type `llama`, so that vLLM reads a drafter folder with the config class
    it has; `architectures` says whose model it really is. The vocabulary head and the embedding
    are the target's, so `hidden_size` and `vocab_size` equal the target's.

    Args:
        target_fingerprint: of the one target this drafter was trained for.
        eagle_aux_hidden_state_layer_ids: target layers whose input states are fused; vLLM's name.
        num_speculative_tokens: drafted tokens per step when the user names no number.
        quickmerge: `MergeConfig` settings as a dict.
        **kwargs: `LlamaConfig` settings.

    Raises:
        ValueError: settings out of range or unknown.
    """

    def __init__(
        self,
        target_fingerprint: str = "",
        eagle_aux_hidden_state_layer_ids: list[int] | None = None,
        num_speculative_tokens: int = 4,
        quickmerge: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.merge = MergeConfig.from_dict(quickmerge or {})
        self.target_fingerprint = target_fingerprint
        self.eagle_aux_hidden_state_layer_ids = list(eagle_aux_hidden_state_layer_ids or [])
        limit = self.merge.max_speculative_tokens
        if not 1 <= num_speculative_tokens <= limit:
            raise ValueError(
                f"QuickMergeConfig: num_speculative_tokens must be in 1..{limit} for a window of "
                f"{self.merge.window}, got {num_speculative_tokens}"
            )
        self.num_speculative_tokens = num_speculative_tokens
        kwargs.setdefault("num_hidden_layers", 1)
        # Nothing in the prior depends on absolute positions; vLLM would cut drafting at a lower limit.
        kwargs.setdefault("max_position_embeddings", 1 << 20)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self.architectures = [ARCHITECTURE]
        self.draft_vocab_size = self.vocab_size

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `config.json`."""
        values = super().to_dict()
        merge = values.pop("merge", self.merge)
        values["quickmerge"] = merge.to_dict() if isinstance(merge, MergeConfig) else merge
        return values
