"""A conversation as a target's chat template writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


def is_message(value: Any) -> bool:
    """Return whether a value has what makes a message: a role and a content, which may be None."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def write_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False) -> str:
    """Return the text of a conversation.

    Args:
        messages: OpenAI messages, from the first on.
        tokenizer: has a chat template.
        ask: add what opens the assistant's next turn.

    Raises:
        ValueError: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template must take the conversation, and refuses it: {error}") from error


def chat_token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of what `write_chat` wrote, the special tokens that stand in it among them."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
