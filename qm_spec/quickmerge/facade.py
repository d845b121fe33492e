"""QuickMerge++ as its two READMEs call it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qm_spec.quickmerge.alignment import BidirectionalARAlignment
from qm_spec.quickmerge.budget import entropy_budget as count_by_entropy
from qm_spec.quickmerge.budget import fixed_budget, ratio_budget
from qm_spec.quickmerge.chunks import join_chunks, join_values, split_chunks
from qm_spec.quickmerge.fidelity import NormBasedFidelityConstraint
from qm_spec.quickmerge.inputs import check_choice, check_tokens, full_mask
from qm_spec.quickmerge.merging import DifferentiableTokenMerging, MergedTokens
from qm_spec.quickmerge.relaxation import relaxed_unmerge
from qm_spec.quickmerge.saliency import make_saliency

BUDGETS = ("entropy", "fixed")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class QuickMergePP(nn.Module):
    """The whole compressor: saliency, selection, merging, prior and losses.

    One class for both READMEs, by keyword: `QuickMergePP(embedding_dim=512)` with a K per call
    (`quickmerge`), and `QuickMergePP(dim=64, k_max=54)` with `compress` and `ar_predict`
    (`quickmergepp`). Only `embedding_dim` may be given by position, since the READMEs disagree
    about what comes second.

    Args:
        embedding_dim: D.
        num_layers: layers of attention entropy for inputs without a layer dimension.
        temperature: tau of the selection (default of `quickmerge`; `quickmergepp` has 0.5).
        gamma: share of the norm mass to keep, 0..1; see `NormBasedFidelityConstraint`.
        epsilon: mass of a token that is not selected at all.
        dim: alias of `embedding_dim`.
        k_max: K of `compress`, and of calls that give none; None demands it per call.
        saliency: `entropy`, `inverse_entropy`, `norm` or `learned`.
        grouping: `cosine` or `kmeans`; the READMEs disagree, see `DifferentiableTokenMerging`.
        budget: `fixed` keeps K tokens; `entropy` keeps as many as are effectively different, at
            most K, per sequence; the slots left over are empty.
        causal: no merged token holds a token later than its place; entropy then comes from
            attention to earlier tokens. Which K tokens are salient is still decided by looking at
            all of them, as any K of N must be; see `chunk_size`.
        normalisation: of the entropy, `minmax` or `fraction`; with `causal`, only `fraction` gives
            a token a saliency that does not depend on later ones. See `EntropyAwareSaliency`.
        chunk_size: cut each sequence into chunks of so many tokens and keep K tokens **of each**:
            what is merged within a chunk depends on that chunk alone, so a sequence can be
            compressed as it grows, in time that is linear in N. None takes it as one chunk.
        input_scale: tokens are divided by it before saliency and prior, which expect values of about
            1 (a model's hidden states have others); merged tokens keep the input's scale.
        prior_layers: layers of the prior.
        prior_heads: heads of the prior.

    Raises:
        TypeError: D is given twice or not at all.
        ValueError: a setting is out of range.

    Source: QuickMerge++, arXiv 2508.13204.
    """

    def __init__(  # noqa: PLR0913 - the paper's settings, as keywords
        self,
        embedding_dim: int | None = None,
        *,
        num_layers: int = 12,
        temperature: float = 0.1,
        gamma: float = 0.8,
        epsilon: float = 0.01,
        dim: int | None = None,
        k_max: int | None = None,
        saliency: str = "entropy",
        grouping: str = "cosine",
        budget: str = "fixed",
        causal: bool = False,
        normalisation: str = "minmax",
        chunk_size: int | None = None,
        input_scale: float = 1.0,
        prior_layers: int = 6,
        prior_heads: int = 8,
    ) -> None:
        super().__init__()
        size = embedding_dim if dim is None else dim
        if size is None or None not in (embedding_dim, dim):
            raise TypeError(f"QuickMergePP: give embedding_dim or its alias dim, got {embedding_dim} and {dim}")
        if k_max is not None and k_max < 1:
            raise ValueError(f"QuickMergePP: k_max must be at least 1, got {k_max}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"QuickMergePP: chunk_size must be at least 1, got {chunk_size}")
        if not (input_scale > 0 and math.isfinite(input_scale)):
            raise ValueError(f"QuickMergePP: input_scale must be above 0, got {input_scale}")
        check_choice("QuickMergePP", "budget", budget, BUDGETS)
        self.embedding_dim = size
        self.k_max = k_max
        self.budget = budget
        self.chunk_size = chunk_size
        self.input_scale = input_scale
        self._settings = {
            "num_layers": num_layers,
            "gamma": gamma,
            "epsilon": epsilon,
            "saliency": saliency,
            "grouping": grouping,
            "causal": causal,
            "normalisation": normalisation,
            "input_scale": input_scale,
            "prior_layers": prior_layers,
            "prior_heads": prior_heads,
        }
        self.saliency = make_saliency(saliency, size, num_layers, causal, normalisation)
        self.merging = DifferentiableTokenMerging(temperature, epsilon, grouping=grouping, causal=causal)
        self.alignment = BidirectionalARAlignment(size, prior_layers, prior_heads)
        self.fidelity = NormBasedFidelityConstraint(gamma)

    def forward(
        self, X: Tensor, K: int | None = None, alpha: float = 0.1, token_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Merge, and say what the merge costs.

        In training mode salient tokens are drawn with Gumbel noise; in eval mode nothing is random.

        Args:
            X: `[B, N, D]`, or `[L, B, N, D]` of which the last layer is merged.
            K: tokens kept per sequence, or per chunk; above N all stay as they are. None takes `k_max`.
            alpha: weight of the alignment loss.
            token_mask: `[B, N]` bool, True = token.

        Returns:
            merged `[B, min(K, N), D]` in X's dtype (with chunks, that of each), and float32 scalars
            with gradients, lower = better: `alignment`, `fidelity` and `total = alpha * alignment + fidelity`.

        Raises:
            TypeError: K is not an integer, or X is not of floats.
            ValueError: K is missing or below 1, or shapes do not fit.
        """
        merged, _, rebuilt = self._merge(X, K, token_mask)
        tokens = X[-1] if X.ndim == 4 else X
        alignment = self.alignment.compute_alignment_loss(self._scaled(merged.tokens), merged.live)
        fidelity = self.fidelity.loss_of_rebuilt(tokens, rebuilt, merged.cluster >= 0)
        losses = {"alignment": alignment, "fidelity": fidelity, "total": alpha * alignment + fidelity}
        return merged.tokens, losses

    def compress(self, h: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Merge to `k_max` tokens without noise, whatever the mode; differentiable all the same.

        Args:
            h: `[L, B, T, D]`, a model's layers, of which the last is merged; or `[B, T, D]`.
            token_mask: `[B, T]` bool, True = token.

        Returns:
            merged `[B, min(k_max, T), D]` in the input's dtype (with chunks, that of each), and info:
            `saliency` `[B, T]` float32 0..1, higher = keep; `assignments` `[B, T]` int64, the
            merged token of each token, -1 at padding; `sizes` `[B, K]` float32, tokens in each;
            `places` `[B, K]` int64, rising; `mask` `[B, K]` bool, False at empty slots.

        Raises:
            TypeError: the input is not of floats.
            ValueError: there is no `k_max`, or shapes do not fit.
        """
        merged, saliency, _ = self._merge(h, None, token_mask, sample=False)
        info = {
            "saliency": saliency,
            "assignments": merged.cluster,
            "sizes": merged.size,
            "places": merged.place,
            "mask": merged.live,
        }
        return merged.tokens, info

    def ar_predict(self, merged: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Return the prior's predictions `[B, K, D]` of `[B, K, D]`: row i is of merged token i + 1.

        Args:
            merged: `[B, K, D]`.
            sizes: `[B, K]`, tokens merged into each (`info["sizes"]`); with them a merged token is
                attended to like so many tokens. See `AutoregressivePrior`.

        Raises:
            TypeError: tokens are not floats.
            ValueError: shapes that do not fit.
        """
        return self.alignment.prior(self._scaled(merged), sizes) * self.input_scale

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` to a folder; needs safetensors."""
        from safetensors.torch import save_file

        settings = {
            "embedding_dim": self.embedding_dim,
            "k_max": self.k_max,
            "budget": self.budget,
            "chunk_size": self.chunk_size,
            # A schedule may have changed it.
            "temperature": self.merging.selection.temperature,
            **self._settings,
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> QuickMergePP:
        """Load the compressor that `save_pretrained` wrote, in eval mode on the CPU.

        Raises:
            FileNotFoundError: the folder has no `config.json` or `model.safetensors`.
            ValueError: the files are not those of a compressor, or not of the same one.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"QuickMergePP: {folder} holds no {name}; pass a folder of save_pretrained")
        try:
            module = cls(**json.loads((folder / CONFIG).read_text()))
            module.load_state_dict(load_file(folder / WEIGHTS))
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"QuickMergePP: {folder} holds another model's {CONFIG} or {WEIGHTS}: {error}") from error
        return module.eval()

    def _scaled(self, tokens: Tensor) -> Tensor:
        return tokens if self.input_scale == 1 else tokens / self.input_scale

    def _merge(
        self, layers: Tensor, keep: int | None, token_mask: Tensor | None, sample: bool | None = None
    ) -> tuple[MergedTokens, Tensor, Tensor]:
        """Return the merged tokens, the saliency, and the tokens rebuilt, with gradients to the choice in training."""
        keep = self.k_max if keep is None else keep
        if keep is None:
            raise ValueError("QuickMergePP: K is missing; pass it to the call, or k_max to the constructor")
        tokens = layers[-1] if layers.ndim == 4 and len(layers) else layers
        check_tokens("QuickMergePP", tokens, self.embedding_dim)
        mask = full_mask("QuickMergePP", tokens, token_mask)
        if self.chunk_size is None:
            return self._merge_whole(layers, keep, mask, token_mask is not None, sample)
        size = min(self.chunk_size, mask.shape[1])
        chunks, chunk_mask, order = split_chunks(layers, mask, size)
        merged, *values = self._merge_whole(chunks, keep, chunk_mask, not bool(chunk_mask.all()), sample)
        saliency, rebuilt = (join_values(value, order) for value in values)
        return join_chunks(merged, order), saliency, rebuilt

    def _merge_whole(
        self, layers: Tensor, keep: int, mask: Tensor, padded: bool, sample: bool | None
    ) -> tuple[MergedTokens, Tensor, Tensor]:
        tokens = layers[-1] if layers.ndim == 4 else layers
        saliency = self.saliency(self._scaled(layers), mask if padded else None)
        if self.budget == "entropy":
            budget = count_by_entropy(tokens, keep, saliency.detach(), mask)
        else:
            budget = fixed_budget(keep, mask)
        merged = self.merging.merge(tokens, saliency, budget, mask, keep, sample)
        if self.training and torch.is_grad_enabled():
            # Only cosine grouping bars a token from the salient ones before it.
            barred = self.merging.causal and self.merging.grouping == "cosine"
            return merged, saliency, relaxed_unmerge(tokens, merged, mask, barred)
        return merged, saliency, merged.unmerge()


@torch.no_grad()
def quickmerge_inference(
    X: Tensor, ar_model: Callable[[Tensor], Tensor], entropy_budget: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Compress tokens and decode them from left to right with a given model.

    Nothing is random. Grouping is causal, because the model reads merged tokens in order.

    Args:
        X: `[N, D]` of one sequence, or `[B, N, D]`.
        ar_model: called with `[B, K, D]`, B = 1 for one sequence; returns `[B, ...]`.
        entropy_budget: share of the tokens kept, above 0 and at most 1: `K = max(1, int(N * share))`
            (the `quickmerge` README, "Compress to 20% of original tokens"). For a budget by entropy
            see `qm_spec.quickmerge.entropy_budget`.

    Returns:
        merged `[K, D]` or `[B, K, D]`, and the model's predictions, without B for one sequence.

    Raises:
        TypeError: X is not of floats.
        ValueError: X's shape or the budget is out of range.

    Source: the `quickmerge` README, inference pipeline.
    """
    single = X.ndim == 2
    tokens = X.unsqueeze(0) if single else X
    check_tokens("quickmerge_inference", tokens)
    mask = full_mask("quickmerge_inference", tokens, None)
    saliency = make_saliency("entropy", tokens.shape[-1], num_layers=12, causal=True)(tokens)
    merging = DifferentiableTokenMerging(causal=True).eval()
    merged = merging.merge(tokens, saliency, ratio_budget(entropy_budget, mask)).tokens
    predictions = ar_model(merged)
    return (merged[0], predictions[0]) if single else (merged, predictions)
