"""`gumbel_softmax`: a softmax of noisy logits, with random numbers that depend on a seed alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

torch.library.define(
    "qm_spec::gumbel_softmax",
    "(Tensor logits, float temperature, float noise, int seed, int offset) -> (Tensor, Tensor)",
)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox(num_words: int, seed: int, offset: int, device: torch.device | str = "cpu") -> Tensor:
    """Return random integers of 32 bits: word i is word i mod 4 of counter (i / 4, offset) under `seed`.

    Args:
        num_words: n.
        seed: the key, 64 bits.
        offset: the upper half of the counter, 64 bits.
        device: where to compute them; they are the same everywhere.

    Returns:
        `[n]` int64 in 0..2^32 - 1.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox4x32-10.
    """
    counter = torch.arange(-(-num_words // 4), device=device)
    c0, c1 = counter & _LOW, counter >> 32
    c2, c3 = torch.full_like(counter, offset & _LOW), torch.full_like(counter, offset >> 32 & _LOW)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(_ROUNDS):
        # The products wrap around as integers of 64 bits do; shift and mask take their halves all the same.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (right >> 32 & _LOW) ^ c1 ^ k0, (left >> 32 & _LOW) ^ c3 ^ k1
        c1, c3 = right & _LOW, left & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten()[:num_words]


def gumbel_softmax_reference(
    logits: Tensor, temperature: float, noise: float, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    """Compute `gumbel_softmax` of `[R, N]` in plain PyTorch."""
    perturbed = logits.float()
    if noise:
        bits = philox(logits.numel(), seed, offset, logits.device).view(logits.shape)
        # 23 bits and a half: exact in float32, and neither 0 nor 1.
        uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
        perturbed = perturbed - noise * (-uniform.log()).log()
    else:
        perturbed = perturbed.clone()
    return torch.softmax(perturbed / temperature, dim=-1).to(logits.dtype), perturbed


torch.library.impl("qm_spec::gumbel_softmax", "default", gumbel_softmax_reference)


@torch.library.register_fake("qm_spec::gumbel_softmax")
def _gumbel_softmax_fake(
    logits: Tensor, temperature: float, noise: float, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty_like(logits, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.temperature = inputs[1]
    ctx.save_for_backward(output[0])


def _backward(ctx: Any, grad: Tensor, grad_perturbed: Tensor) -> tuple[Tensor, None, None, None, None]:
    (probabilities,) = ctx.saved_tensors
    p, g = probabilities.float(), grad.float()
    through = p * (g - (p * g).sum(-1, keepdim=True)) / ctx.temperature
    return (through + grad_perturbed).to(probabilities.dtype), None, None, None, None


torch.library.register_autograd("qm_spec::gumbel_softmax", _backward, setup_context=_setup_context)


def gumbel_softmax(
    logits: Tensor, temperature: float, *, seed: int, offset: int = 0, noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return `softmax((s + noise g) / temperature)` over the last dimension, and `s + noise g`.

    `g ~ Gumbel(0, 1)` of an element depends on its place, `seed` and `offset`: the same on every
    device and for any number of threads. The K largest noisy logits are K draws without replacement.

    Args:
        logits: `[..., N]`, any float dtype; -inf gets the probability 0.
        temperature: above 0.
        seed: 64 bits.
        offset: another one gives independent noise, such as the number of the call; 64 bits.
        noise: factor of the noise; 0 makes it a softmax.

    Returns:
        probabilities `[..., N]` in the logits' dtype (computed in float32) and noisy logits `[..., N]`
        float32. Differentiable.

    Raises:
        TypeError: logits are not floats.
        ValueError: logits have no dimension, or a number is out of range.

    Source: QuickMerge++, arXiv 2508.13204; Jang et al. 2017, arXiv 1611.01144.
    """
    if not logits.is_floating_point():
        raise TypeError(f"gumbel_softmax: logits must be floats, got {logits.dtype}")
    if logits.ndim == 0:
        raise ValueError("gumbel_softmax: logits must be [..., N], got a single number")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"gumbel_softmax: temperature must be above 0, got {temperature}")
    if not (noise >= 0 and math.isfinite(noise)):
        raise ValueError(f"gumbel_softmax: noise must be at least 0, got {noise}")
    *batch, num_columns = logits.shape
    rows = logits.reshape(torch.Size(batch).numel(), num_columns)
    probabilities, perturbed = torch.ops.qm_spec.gumbel_softmax(rows, temperature, noise, seed, offset)
    return probabilities.view(logits.shape), perturbed.view(logits.shape)
