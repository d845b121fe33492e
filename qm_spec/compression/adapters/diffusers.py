"""Pipelines of the diffusers library: fewer prompt tokens, and fewer tokens in the UNet's self-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qm_spec.compression.sizes import compression_report
from qm_spec.compression.token_compressor import compress_tokens
from qm_spec.quickmerge import MergedTokens
from qm_spec.quickmerge.inputs import check_tokens

_BY_NORM = partial(compress_tokens, saliency="norm", grouping="cosine")


@dataclass(frozen=True)
class MergedPrompt:
    """A prompt and its negative with the same number of tokens.

    Attributes:
        prompt_embeds: `[B, K, D]`.
        negative_prompt_embeds: `[B, K, D]`, or None.
        log_size: `[B, K]`, or `[2B, K]` with the negative first, as pipelines batch them under
            guidance: to add to cross-attention scores, see `merged_attention`.
        info: `compression_report` of both.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    log_size: Tensor
    info: dict[str, Any]


class PromptMerger:
    """Merge prompt embeddings for `pipeline(prompt_embeds=..., negative_prompt_embeds=...)`.

    `embeds, negative = PromptMerger(32)(prompt_embeds, negative_prompt_embeds)`, with both from
    `pipeline.encode_prompt(...)`.

    It saves keys, values and scores of cross-attention: of 77 tokens, little beside the rest of a
    UNet, more with long prompts (T5) or where features are small. The text encoder has run by then.
    Padding after a short prompt is much alike and merges first; as one token it would weigh less
    than it did, which `merged_attention(unet, log_size=...)` makes up for.

    Args:
        k_max: tokens kept of each prompt, above `keep_first`.
        keep_first: first tokens that stay as they are: CLIP's begin token, the same in all prompts,
            takes much of the attention.
        compress: merges `[B, n, D]` to at most K tokens, such as a `TokenCompressor`.

    Raises:
        ValueError: `keep_first` is out of range.
    """

    def __init__(
        self,
        k_max: int = 32,
        *,
        keep_first: int = 1,
        compress: Callable[[Tensor, int], MergedTokens] = compress_tokens,
    ) -> None:
        if not 0 <= keep_first < k_max:
            raise ValueError(f"PromptMerger: keep_first must be in 0..k_max - 1 = {k_max - 1}, got {keep_first}")
        self.k_max = k_max
        self.keep_first = keep_first
        self.compress = compress

    def __call__(
        self, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return both with `min(k_max, N)` tokens; see `merge`."""
        merged = self.merge(prompt_embeds, negative_prompt_embeds)
        return merged.prompt_embeds, merged.negative_prompt_embeds

    def merge(self, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None = None) -> MergedPrompt:
        """Merge both to `min(k_max, N)` tokens.

        Args:
            prompt_embeds: `[B, N, D]`, any float dtype.
            negative_prompt_embeds: the same shape, or None.

        Raises:
            TypeError: embeddings are not floats.
            ValueError: shapes that do not fit.
        """
        both = [prompt_embeds] if negative_prompt_embeds is None else [negative_prompt_embeds, prompt_embeds]
        for embeds in both:
            check_tokens("PromptMerger", embeds)
            if embeds.shape != prompt_embeds.shape:
                raise ValueError(
                    f"PromptMerger: negative_prompt_embeds must be {list(prompt_embeds.shape)} like prompt_embeds, "
                    f"got {list(embeds.shape)}"
                )
        embeds = torch.cat(both)
        first = min(self.keep_first, embeds.shape[1])
        tokens, log_size = embeds[:, :first], embeds.new_zeros(len(embeds), first, dtype=torch.float32)
        if first < embeds.shape[1]:
            merged = self.compress(embeds[:, first:], self.k_max - first)
            tokens, log_size = torch.cat([tokens, merged.tokens], 1), torch.cat([log_size, merged.log_size], 1)
        lengths = (torch.full((len(embeds),), x.shape[1]) for x in (embeds, tokens))
        info = compression_report([embeds], [tokens], *lengths)
        *negative, prompt = tokens.chunk(len(both))
        return MergedPrompt(prompt, negative[0] if negative else None, log_size, info)


@contextmanager
def merged_attention(
    unet: Any,
    *,
    keep: float | None = None,
    log_size: Tensor | None = None,
    compress: Callable[[Tensor, int], MergedTokens] = _BY_NORM,
) -> Iterator[None]:
    """Let a UNet's attention work on merged tokens; on leaving, it is as it was.

    Self-attention merges its input, attends, and gives each place the output of its merged token, so
    every block gets its shape again. Cross-attention adds the prompt's `log_size`. Merged tokens
    weigh like all they hold in both.

    Attention over N tokens becomes one over `keep N`; merging costs a product of N and `keep N`
    tokens (and of N and N with entropy saliency) of its own. It pays where attention with all its
    heads and projections costs more than that.

    Args:
        unet: a `UNet2DConditionModel` of diffusers, or what else has `attn_processors`.
        keep: share of the tokens kept in self-attention, above 0 and at most 1; None leaves it alone.
        log_size: `[b, K]` of the prompt, from `PromptMerger.merge`; None leaves cross-attention alone.
        compress: merges features `[B, N, C]` to at most K. The default takes saliency by norm, in time
            linear in N, and groups by cosine once; k-means is nearer to the whole and costs more
            than the attention it replaces.

    Raises:
        ValueError: `keep` is out of range.

    Source: ours, after ToMe for Stable Diffusion, arXiv 2303.17604.
    """
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"merged_attention: keep must be above 0 and at most 1, got {keep}")
    before = dict(unet.attn_processors)
    unet.set_attn_processor({name: _Merged(one, keep, log_size, compress) for name, one in before.items()})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


class _Merged:
    """An attention processor around another one."""

    def __init__(
        self,
        inner: Any,
        keep: float | None,
        log_size: Tensor | None,
        compress: Callable[[Tensor, int], MergedTokens],
    ) -> None:
        self.inner = inner
        self.keep = keep
        self.log_size = log_size
        self.compress = compress

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            if self.log_size is not None:
                if self.log_size.shape[1] != encoder_hidden_states.shape[1]:
                    raise ValueError(
                        f"merged_attention: log_size must be of the {encoder_hidden_states.shape[1]} prompt tokens "
                        f"that the UNet is given, got {self.log_size.shape[1]}; merge the prompt first"
                    )
                # One bias for all images of a prompt.
                bias = self.log_size.repeat_interleave(len(encoder_hidden_states) // len(self.log_size), dim=0)
                bias = bias.unsqueeze(1).to(encoder_hidden_states)
                attention_mask = bias if attention_mask is None else attention_mask + bias
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **settings)
        # Attention that adds the residual itself, on images, is not a transformer block's.
        if self.keep is None or hidden_states.ndim != 3 or attn.residual_connection:
            return self.inner(attn, hidden_states, None, attention_mask, temb, **settings)
        keep = max(1, int(self.keep * hidden_states.shape[1]))
        merged = self.compress(hidden_states, keep)
        bias = merged.log_size.unsqueeze(1).to(hidden_states)
        return merged.unmerge(self.inner(attn, merged.tokens, None, bias, temb, **settings))
