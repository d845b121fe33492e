"""Rotary position embeddings: turn keys back to what they hold, and forth to where they stand."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Their inverse frequencies do not depend on the length, so a key can be turned at any time.
_FIXED_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding that turns the dimensions i and i + d/2 together, as Llama, Mistral and Qwen do.

    Attributes:
        inverse_frequencies: `[d/2]` float32, radians per position.

    Source: RoFormer, arXiv 2104.09864, in the layout of GPT-NeoX.
    """

    inverse_frequencies: Tensor

    def rotate(self, states: Tensor, position: Tensor) -> Tensor:
        """Return the states turned by `position` times the inverse frequencies.

        `rotate(x, -p)` takes a rotation by p back. Only differences of positions matter to a merge.

        Args:
            states: `[..., N, d]`, any float dtype.
            position: `[..., N]`, integers, of a shape that broadcasts to that of the states.

        Returns:
            `[..., N, d]` float32.

        Raises:
            ValueError: the states' last dimension is not twice the number of frequencies.
        """
        frequencies = self.inverse_frequencies.to(states.device)
        if states.shape[-1] != 2 * len(frequencies):
            raise ValueError(
                f"Rotary: states must have {2 * len(frequencies)} dimensions, got {states.shape[-1]}; "
                "only rotary embeddings of the whole head are known"
            )
        # In float32, as models compute it, so that the rounding of large angles cancels too.
        angle = position.unsqueeze(-1).float() * frequencies
        cos, sin = angle.cos(), angle.sin()
        first, second = states.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Rotary:
        """Return a transformers model's rotary embedding, after a test that it turns keys as this class does.

        Raises:
            ValueError: the model has none, another layout (partial, interleaved, per layer), or
                frequencies that depend on the length.
        """
        decoder = model.get_decoder()
        name = type(decoder).__name__
        embedding = getattr(decoder, "rotary_emb", None)
        if embedding is None or not isinstance(getattr(embedding, "inv_freq", None), Tensor):
            raise ValueError(
                f"Rotary: {name} must have one rotary embedding for all layers (rotary_emb.inv_freq), got none; "
                "pass rotary=None to merge its keys as they are"
            )
        if embedding.rope_type not in _FIXED_TYPES:
            raise ValueError(
                f"Rotary: rope_type of {name} must be one of {sorted(_FIXED_TYPES)}, got {embedding.rope_type!r}, "
                "whose frequencies change with the length"
            )
        rotary = cls(embedding.inv_freq.detach().float())
        attention = decoder.layers[0].self_attn
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        head_dim = getattr(attention, "head_dim", None)
        position = torch.tensor([[0, 1, 7, 100]], device=embedding.inv_freq.device)
        if apply is not None and head_dim == 2 * embedding.inv_freq.numel():
            probe = torch.linspace(-1, 1, 4 * head_dim, device=position.device).view(1, 1, 4, head_dim)
            _, turned = apply(probe, probe, *embedding(probe, position))
            if torch.allclose(turned, rotary.rotate(probe, position) * embedding.attention_scaling, atol=1e-4):
                return rotary
        raise ValueError(
            f"Rotary: {name} must turn the dimensions i and i + d/2 of whole heads (Llama, Mistral, Qwen), "
            "got another layout (partial or interleaved); pass rotary=None to merge its keys as they are"
        )
