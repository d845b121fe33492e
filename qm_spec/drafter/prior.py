"""The QuickMerge++ autoregressive prior: one causal layer over the merged cache."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from qm_spec.config import ARCHITECTURE
from qm_spec.drafter.layer import PriorLayer
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.drafter.sequences import PriorSequences
from qm_spec.drafter.vocabulary import DraftVocabulary


class QuickMergePrior(DraftVocabulary, PreTrainedModel):
    """The prior as a checkpoint: `from_pretrained` and `save_pretrained` of a drafter folder.

    The embedding and the vocabulary head are the target's and are not stored.
    """

    config_class = QuickMergeConfig
    config: QuickMergeConfig
    base_model_prefix = "prior"

    def __init__(self, config: QuickMergeConfig) -> None:
        super().__init__(config)
        self.layer = PriorLayer(config)
        self.init_draft_vocabulary(config.draft_vocab_size, config.vocab_size)
        self.post_init()

    def read(self, aux_states: Tensor, embeddings: Tensor) -> PriorSequences:
        """Read whole sequences: the target's states `[B, N, 3 D]` and the tokens' embeddings `[B, N, D]`."""
        return PriorSequences(self.layer, self.config.merge, aux_states, embeddings)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save a drafter folder; its config names vLLM's class, not this one."""
        super().save_pretrained(save_directory, **kwargs)
        self.config.architectures = [ARCHITECTURE]
        self.config.save_pretrained(save_directory)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PriorLayer):
            module.reset_biases(self.config.merge.window)
            # The first prior is the identity on the fused state plus what it learns.
            for name in ("o_proj", "down_proj", "in_proj"):
                for weight in module.get_submodule(name).parameters():
                    nn.init.zeros_(weight)
            if module.next_proj is not None and self.config.reads_embedding:
                module.wire_recall()
