"""Vision-language models of transformers: fewer image tokens for the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qm_spec.compression.sizes import compression_report
from qm_spec.compression.token_compressor import compress_tokens
from qm_spec.quickmerge import MergedTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge_image_tokens(
    model: PreTrainedModel,
    k_max: int,
    input_ids: Tensor,
    pixel_values: Tensor,
    attention_mask: Tensor | None = None,
    compress: Callable[[Tensor, int], MergedTokens] = compress_tokens,
    **image_arguments: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a prompt in which each image has at most `k_max` tokens, for `model(**...)` or `model.generate(**...)`.

    The image's features are merged after the projector, and its placeholders in the prompt shrink
    with them. What follows costs less: prefill, each decode step's attention, and the language
    model's cache. The vision tower reads the whole image as before. Merged tokens take consecutive
    positions in the order of their places, so a model trained with a fixed grid sees them closer
    together; they weigh like one token each.

    With `k_max` at or above an image's tokens the prompt is what the model would have made itself.

    Args:
        model: one that replaces placeholder tokens by image features and reads them like text
            afterwards, such as `LlavaForConditionalGeneration`.
        k_max: tokens kept per image, at least 1.
        input_ids: `[B, N]`, as the model's processor makes them, one placeholder per image token.
        pixel_values: as the processor makes them, images in the order of their placeholders.
        attention_mask: `[B, N]`; padding may stand on either side.
        compress: merges `[1, n, D]` to at most `k_max`, such as a `TokenCompressor`.
        **image_arguments: handed to `model.get_image_features`, such as `image_sizes`.

    Returns:
        `inputs_embeds` `[B, M, D]`, `attention_mask` and `position_ids` `[B, M]`, padded on the left;
        `generate` then returns the new tokens alone. And `compression_report` of the prompt's embeddings, with
        `image_tokens_before` and `image_tokens_after`, of the whole batch, and `token_sizes` `[B, M]`
        float32, tokens in each column, 0 at padding.

    Raises:
        ValueError: the model is of another kind, or placeholders and features do not match.
    """
    image_token = _check_model(model)
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixel_values, **image_arguments)
    # transformers 5 returns an output object, 4 the features themselves; one tensor per image in both.
    features: Sequence[Tensor] = list(getattr(found, "pooler_output", found))
    merged = [compress(feature.unsqueeze(0), k_max) for feature in features]

    rows: list[Tensor] = []
    row_sizes: list[Tensor] = []
    row_positions: list[Tensor] = []
    image = 0
    embed = model.get_input_embeddings()
    for ids in (row[real] for row, real in zip(input_ids, mask, strict=True)):
        sizes = torch.ones(len(ids), device=ids.device)
        embeds = embed(ids)
        slots = (ids == image_token).nonzero().squeeze(-1)
        while len(slots):
            if image == len(features) or len(features[image]) > len(slots):
                raise ValueError(_mismatch(input_ids, mask, image_token, features))
            own, slots = slots[: len(features[image])], slots[len(features[image]) :]
            place = own[merged[image].place[0]]
            # Size 0 marks the placeholders that go.
            sizes[own] = 0.0
            sizes[place] = merged[image].size[0]
            embeds[place] = merged[image].tokens[0].to(embeds.dtype)
            image += 1
        stays = sizes.nonzero().squeeze(-1)
        rows.append(embeds[stays])
        row_sizes.append(sizes[stays])
        row_positions.append(stays)
    if image != len(features):
        raise ValueError(_mismatch(input_ids, mask, image_token, features))

    after = torch.tensor([len(row) for row in rows], device=input_ids.device)
    inputs_embeds = pad_sequence(rows, batch_first=True, padding_side="left")
    token_sizes = pad_sequence(row_sizes, batch_first=True, padding_side="left")
    prompt = {
        "inputs_embeds": inputs_embeds,
        "attention_mask": (token_sizes > 0).to(input_ids.dtype),
        "position_ids": pad_sequence(row_positions, batch_first=True, padding_side="left"),
    }
    whole = inputs_embeds.new_empty((*input_ids.shape, inputs_embeds.shape[-1]), device="meta")
    info = {
        **compression_report([whole], [inputs_embeds], mask.sum(-1), after),
        "image_tokens_before": sum(map(len, features)),
        "image_tokens_after": sum(one.tokens.shape[1] for one in merged),
        "token_sizes": token_sizes,
    }
    return prompt, info


def _check_model(model: PreTrainedModel) -> int:
    name = type(model).__name__
    image_token = getattr(model.config, "image_token_id", None)
    if image_token is None or not hasattr(model, "get_image_features"):
        raise ValueError(
            "merge_image_tokens: model must have config.image_token_id and get_image_features, as LLaVA has, "
            f"got {name}"
        )
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if "mrope_section" in rope:
        raise ValueError(
            f"merge_image_tokens: {name} gives image tokens positions on a grid, which merged tokens do not have; "
            "pass a model with positions in a row, as LLaVA has"
        )
    if hasattr(type(model), "create_masks_for_generate"):
        raise ValueError(
            f"merge_image_tokens: {name} attends to image tokens by a mask of its own (both ways), which a prompt "
            "of embeddings would lose; pass a model that reads them like text, as LLaVA does"
        )
    return image_token


def _mismatch(input_ids: Tensor, mask: Tensor, image_token: int, features: Sequence[Tensor]) -> str:
    placeholders = ((input_ids == image_token) & mask).sum(-1).tolist()
    return (
        f"merge_image_tokens: every image must have one placeholder (token {image_token}) per feature in its row, "
        f"got rows with {placeholders} placeholders and images with {[len(image) for image in features]} features; "
        "pass input_ids as the model's processor makes them"
    )
