"""`create_speculative_decoder`: a target of either kind, with the drafter that fits it."""

from __future__ import annotations

import warnings
from os import PathLike

from torch import nn
from transformers import PreTrainedModel

from qm_spec.decoding.bare_target import BareTarget
from qm_spec.decoding.cached_target import CachedTarget, check_model, unapplied_settings
from qm_spec.decoding.memory_drafter import MemoryDrafter, MemoryDraftModel
from qm_spec.decoding.prior_drafter import PriorDrafter, load_prior
from qm_spec.decoding.speculation import DEFAULT_DRAFT_LEN, SpeculativeDecoder
from qm_spec.drafter.prior import QuickMergePrior


def create_speculative_decoder(
    target_model: nn.Module,
    vocab_size: int | None = None,
    dim: int | None = None,
    quickmerge_dim: int | None = None,
    k_max: int = 32,
    max_draft_len: int | None = None,
    temperature: float = 1.0,
    *,
    drafter: str | PathLike[str] | nn.Module | None = None,
    seed: int = 0,
) -> SpeculativeDecoder:
    """Return a decoder whose output is the target's own, drafted from a QuickMerge++ memory.

    Two kinds of target:

    - A causal LM of transformers. It is decoded with its key/value cache. The drafter is a
      `QuickMergePrior`, which reads the target's hidden states: the one given, else the target's own
      (as vLLM's plug-in finds it), else an untrained one, with a warning.
    - Any other module that returns logits `[B, T, V]` from token ids `[B, T]`, causal and without a
      cache: each step runs it on the whole prefix. The drafter is a `MemoryDraftModel`, which reads
      compressed encoder states and the tokens. It is untrained unless one is given.

    An untrained drafter changes no token, it only makes decoding slower; `decoder.drafter` is the
    module to train.

    Args:
        target_model: the model that decides; not changed.
        vocab_size: V; needed for a bare module, checked for a transformers model.
        dim: D; width of a bare module's encoder states (default `quickmerge_dim`), checked against a
            transformers model's hidden size.
        quickmerge_dim: width of merged tokens of an untrained drafter; 64 for a bare module, and as
            wide as the target's keys for a transformers model.
        k_max: merged tokens that the draft model of a bare module reads; a prior has a merging
            schedule in its place.
        max_draft_len: K, tokens drafted per step; None takes a trained drafter's own, else 4.
        temperature: 0 decodes greedily; above 0 both models sample at it.
        drafter: a drafter folder, a `QuickMergePrior` or, for a bare module, a `MemoryDraftModel`.
        seed: of an untrained drafter's weights.

    Raises:
        FileNotFoundError: the drafter's folder or one of its files is missing.
        TypeError: the target is no module, or the drafter is not of its kind.
        ValueError: sizes do not fit, the drafter is another target's, or the target cannot be
            decoded speculatively.

    Source: the `quickmergepp` README, speculative decoding.
    """
    if not isinstance(target_model, nn.Module):
        raise TypeError(
            f"create_speculative_decoder: target_model must be an nn.Module, got {type(target_model).__name__}; "
            "load a transformers model with AutoModelForCausalLM.from_pretrained"
        )
    if isinstance(target_model, PreTrainedModel):
        check_model(target_model)
        _check_stated(target_model, vocab_size, dim)
        if isinstance(drafter, nn.Module) and not isinstance(drafter, QuickMergePrior):
            raise TypeError(
                "create_speculative_decoder: the drafter of a transformers model must be a folder or a "
                f"QuickMergePrior, got {type(drafter).__name__}"
            )
        ignored = unapplied_settings(target_model, temperature > 0)
        if ignored:
            warnings.warn(
                f"create_speculative_decoder: the target's generation config asks for {ignored}, which is not applied; "
                "tokens follow the model's logits and the temperature alone",
                stacklevel=2,
            )
        prior = load_prior(target_model, drafter, quickmerge_dim, seed)
        depth = prior.config.num_speculative_tokens if max_draft_len is None else max_draft_len
        target = CachedTarget(target_model, prior.config.eagle_aux_hidden_state_layer_ids)
        return SpeculativeDecoder(target, PriorDrafter(prior, target_model), depth, temperature)

    if drafter is None:
        if vocab_size is None:
            raise TypeError("create_speculative_decoder: vocab_size must be given for a target without a config")
        width = 64 if quickmerge_dim is None else quickmerge_dim
        warnings.warn(
            "create_speculative_decoder: drafting with an untrained model, which is right but slow; train "
            "decoder.drafter on token ids that the target writes, and pass it as drafter=MODEL",
            stacklevel=2,
        )
        drafter = MemoryDraftModel(vocab_size, width if dim is None else dim, width, k_max, seed=seed)
    elif not isinstance(drafter, MemoryDraftModel):
        raise TypeError(
            "create_speculative_decoder: the drafter of a bare module must be a MemoryDraftModel, "
            f"got {type(drafter).__name__}; a drafter folder serves a transformers model"
        )
    elif vocab_size not in (None, drafter.vocab_size) or dim not in (None, drafter.dim):
        raise ValueError(
            f"create_speculative_decoder: the drafter has vocab_size {drafter.vocab_size} and dim {drafter.dim}, "
            f"got {vocab_size} and {dim}; leave them out"
        )
    bare = BareTarget(target_model, drafter.vocab_size, drafter.dim)
    depth = DEFAULT_DRAFT_LEN if max_draft_len is None else max_draft_len
    return SpeculativeDecoder(bare, MemoryDrafter(drafter, bare.device), depth, temperature)


def _check_stated(model: PreTrainedModel, vocab_size: int | None, dim: int | None) -> None:
    sizes = model.config.get_text_config()
    # A head may be padded beyond the vocabulary.
    vocabularies = {sizes.vocab_size, model.get_output_embeddings().weight.shape[0]}
    if vocab_size not in (None, *vocabularies) or dim not in (None, sizes.hidden_size):
        raise ValueError(
            f"create_speculative_decoder: vocab_size and dim must be the target's {sizes.vocab_size} and "
            f"{sizes.hidden_size}, got {vocab_size} and {dim}; leave them out"
        )
