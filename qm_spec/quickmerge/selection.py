"""Selection: which tokens keep a place of their own, and how much each weighs in a merge."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qm_spec.ops import gumbel_softmax
from qm_spec.quickmerge.inputs import full_mask


@dataclass(frozen=True)
class Selection:
    """The salient tokens of each sequence, in their order.

    Attributes:
        index: `[B, K]` int64, positions of the salient tokens, rising; N where a slot is empty.
        live: `[B, K]` bool, slots that are used, the first ones of each sequence.
        mask: `[B, N]` float32, exactly 1 at salient tokens and 0 elsewhere; its gradient is that of
            the probability of being drawn (straight-through).
        mass: `[B, N]` float32, weight in a merge, positive; 0 at padding.
    """

    index: Tensor
    live: Tensor
    mask: Tensor
    mass: Tensor


@dataclass(frozen=True)
class TemperatureSchedule:
    """The temperature at a training step, falling geometrically from `start` to `end`.

    Attributes:
        start: at step 0.
        end: from step `num_steps` on.
        num_steps: at least 1.
    """

    start: float = 1.0
    end: float = 0.1
    num_steps: int = 1000

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0 and self.num_steps >= 1):
            raise ValueError(
                "TemperatureSchedule: start and end must be above 0 and num_steps at least 1, "
                f"got {self.start}, {self.end} and {self.num_steps}"
            )

    def __call__(self, step: int) -> float:
        """Return the temperature at `step`."""
        part = min(max(step / self.num_steps, 0.0), 1.0)
        return self.start * (self.end / self.start) ** part


class TokenSelection(nn.Module):
    """Draw K salient tokens by Gumbel-softmax in training; take the K most salient ones in eval mode.

    `pi = softmax((s + noise g) / tau)`, `g ~ Gumbel(0, 1)` in training and 0 in eval mode; the K
    largest are selected (ties: the earlier token) and `m = pi s + (1 - pi) eps`.

    Args:
        temperature: tau, above 0; may be set anew at any step, see `TemperatureSchedule`.
        epsilon: mass of a token that is not selected at all, above 0 and below 1.
        noise: factor of the Gumbel noise. The READMEs' formula is 1.0, but s lies in 0..1 and the
            noise has a standard deviation of 1.28, so the draw hardly depends on the saliency.
        keep_last: always select the last token of a sequence; causal grouping needs it.

    Raises:
        ValueError: a setting is out of range.

    Source: QuickMerge++, arXiv 2508.13204, and the READMEs' formulas.
    """

    def __init__(
        self, temperature: float = 0.1, epsilon: float = 0.01, noise: float = 0.1, keep_last: bool = False
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"TokenSelection: temperature must be above 0, got {temperature}")
        if not 0 < epsilon < 1:
            raise ValueError(f"TokenSelection: epsilon must lie between 0 and 1, got {epsilon}")
        if not (noise >= 0 and math.isfinite(noise)):
            raise ValueError(f"TokenSelection: noise must be at least 0, got {noise}")
        self.temperature = temperature
        self.epsilon = epsilon
        self.noise = noise
        self.keep_last = keep_last

    def forward(
        self,
        saliency: Tensor,
        budget: Tensor,
        token_mask: Tensor | None = None,
        num_slots: int | None = None,
        sample: bool | None = None,
    ) -> Selection:
        """Select `budget[b]` tokens of each sequence.

        Args:
            saliency: `[B, N]`, 0..1, higher = keep.
            budget: `[B]` int64, 0..N, no more than the sequence has tokens.
            token_mask: `[B, N]` bool, True = token.
            num_slots: K, at least the largest budget; None takes that, which waits for the device.
            sample: draw with noise; None does so in training mode only.

        Returns:
            See `Selection`.

        Raises:
            ValueError: shapes that do not fit.
        """
        if saliency.ndim != 2 or budget.shape != saliency.shape[:1]:
            raise ValueError(
                f"TokenSelection: saliency must be [B, N] and budget [B], "
                f"got {list(saliency.shape)} and {list(budget.shape)}"
            )
        mask = full_mask("TokenSelection", saliency, token_mask)
        num_tokens = saliency.shape[1]
        saliency = saliency.float().masked_fill(~mask, 0.0)
        noise = self.noise if (self.training if sample is None else sample) else 0.0
        # From torch's generator, so that torch.manual_seed decides the draw; the same on every device.
        seed = int(torch.randint(1 << 62, ())) if noise else 0
        logits = saliency.masked_fill(~mask, torch.finfo(torch.float32).min)
        pi, perturbed = gumbel_softmax(logits, self.temperature, seed=seed, noise=noise)
        pi = pi.masked_fill(~mask, 0.0)
        # The floor holds where noise drives pi to 1 at a saliency of 0.
        mass = (pi * saliency + (1 - pi) * self.epsilon).clamp_min(1e-3 * self.epsilon).masked_fill(~mask, 0.0)

        priority = perturbed.detach().masked_fill(~mask, float("-inf"))
        position = torch.arange(num_tokens, device=saliency.device)
        if self.keep_last:
            last = torch.where(mask, position, -1).amax(-1, keepdim=True)
            priority = priority.masked_fill(position == last, float("inf"))
        slots = int(budget.max()) if num_slots is None else min(num_slots, num_tokens)
        chosen = priority.argsort(dim=-1, descending=True, stable=True)[:, :slots]
        used = torch.arange(slots, device=saliency.device) < budget.unsqueeze(-1)
        index = torch.where(used, chosen, num_tokens).sort(dim=-1).values
        hard = saliency.new_zeros(len(saliency), num_tokens + 1).scatter_(1, index, 1.0)[:, :num_tokens]
        # The chance to be drawn at least once in K draws.
        soft = 1 - (1 - pi).clamp_min(0.0) ** budget.unsqueeze(-1).float()
        return Selection(index, index < num_tokens, hard + (soft - soft.detach()), mass)
