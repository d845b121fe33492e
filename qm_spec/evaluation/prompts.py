"""Prompts of a measurement: built in or from a JSON-lines file, as the target's token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qm_spec.evaluation.settings import BUILTIN
from qm_spec.evaluation.shards import TokenPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN_FILE = Path(__file__).resolve().parents[1] / "zoo" / "novels" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was written: either a text or a conversation.

    Args:
        prompt_id: the row's `id` or `question_id`, else its line number.
        text: running text; None for a conversation.
        messages: OpenAI messages; None for a text.
    """

    prompt_id: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None


def prompts_file(source: str) -> Path:
    """Return the file behind `source`, which is "builtin" or a path."""
    return BUILTIN_FILE if source == BUILTIN else Path(source)


def sha256_of(file: Path) -> str:
    """Hash a file as 64 hex digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_prompts(file: Path, num_prompts: int | None = None) -> list[Prompt]:
    """Read the first `num_prompts` rows of a JSON-lines file, all for None; blank lines do not count.

    A row has a `text`, a `prompt` or OpenAI `messages`, and may have an `id`.

    Raises:
        ValueError: a line is not such a row (the message has its number), or there are too few rows.
    """
    prompts = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                prompts.append(_prompt(line, f"{file}:{number}", number))
    if not prompts or (num_prompts or 0) > len(prompts):
        raise ValueError(
            f"prompts: {file} must hold at least {num_prompts or 1} prompts, got {len(prompts)}; "
            "ask for fewer with num_prompts or add rows"
        )
    return prompts[:num_prompts]


def _prompt(line: str, place: str, number: int) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts: {place} must be a JSON object, got {line.strip()[:60]!r} ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"prompts: {place} must be a JSON object, got {type(row).__name__}")
    prompt_id = str(row.get("id", row.get("question_id", number)))
    for field in ("text", "prompt"):
        if isinstance(row.get(field), str) and row[field]:
            return Prompt(prompt_id, text=row[field])
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(one) for one in messages):
        return Prompt(prompt_id, messages=tuple(messages))
    raise ValueError(
        f"prompts: {place} must have a 'text' or 'prompt' string or a list of 'messages' with role "
        f"and content, got only {sorted(row)}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def tokenize_prompts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[TokenPrompt]:
    """Return each prompt's token ids, the special tokens that the tokenizer puts around a text included.

    Raises:
        ValueError: a conversation meets a tokenizer without a chat template.
    """
    return [TokenPrompt(prompt.prompt_id, _token_ids(prompt, tokenizer)) for prompt in prompts]


def _token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if prompt.messages is None:
        return tuple(tokenizer(prompt.text, verbose=False)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError(
            f"prompts: {prompt.prompt_id} has messages, but the target's tokenizer has no chat template; "
            "pass rows with a 'text', or a target trained to chat"
        )
    text = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens.
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def cut_prompts(prompts: Sequence[TokenPrompt], num_tokens: int | None) -> tuple[TokenPrompt, ...]:
    """Cut each prompt to its first `num_tokens` tokens; None leaves all as they are.

    Raises:
        ValueError: a prompt is shorter; the message names it and its length.
    """
    if num_tokens is None:
        return tuple(prompts)
    for prompt in prompts:
        if len(prompt.token_ids) < num_tokens:
            raise ValueError(
                f"context_lengths: every prompt must have {num_tokens} tokens, got {len(prompt.token_ids)} "
                f"in prompt {prompt.prompt_id}; pass a smaller length or longer text"
            )
    return tuple(TokenPrompt(prompt.prompt_id, prompt.token_ids[:num_tokens]) for prompt in prompts)
