"""Prompts of a measurement: built in or from a JSON-lines file, as the target's token ids."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qm_spec.bench.engine.shards import TokenPrompt
from qm_spec.bench.settings import BUILTIN
from qm_spec.data.chat import chat_token_ids, write_chat
from qm_spec.data.json_lines import read_rows
from qm_spec.data.prompt_rows import Prompt, prompt_from_row
from qm_spec.pairs import NOVELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN_FILE = NOVELS / "prompts.jsonl"


def prompts_file(source: str) -> Path:
    """Return the file behind `source`, which is "builtin" or a path."""
    return BUILTIN_FILE if source == BUILTIN else Path(source)


def sha256_of(file: Path) -> str:
    """Hash a file as 64 hex digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_prompts(file: Path, num_prompts: int | None = None) -> list[Prompt]:
    """Read the first `num_prompts` rows of a file of prompts, all for None; blank lines do not count.

    A row has a `text`, a `prompt` or OpenAI `messages`, and may have an `id`; `prompt_from_row` lists the other
    shapes that are read. Where an id stands twice, the later rows' ids get a number, so that every prompt has its own.

    Raises:
        ValueError: a line is not such a row (the message has its number), or there are too few rows.
    """
    prompts: list[Prompt] = []
    seen: Counter[str] = Counter()
    for number, row in read_rows(file):
        if len(prompts) == num_prompts:
            break
        prompt = prompt_from_row(row, number, f"{file}:{number}")
        if prompt is not None:
            seen[prompt.prompt_id] += 1
            times = seen[prompt.prompt_id]
            prompts.append(replace(prompt, prompt_id=f"{prompt.prompt_id}#{times}") if times > 1 else prompt)
    if not prompts or (num_prompts or 0) > len(prompts):
        raise ValueError(
            f"prompts: {file} must hold at least {num_prompts or 1} prompts, got {len(prompts)}; "
            "ask for fewer with num_prompts or add rows"
        )
    return prompts


def tokenize_prompts(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[TokenPrompt]:
    """Return each prompt's token ids, the special tokens that the tokenizer puts around a text included.

    Raises:
        ValueError: a conversation without a text of its own meets a tokenizer without a chat template, or a
            prompt has neither.
    """
    return [
        TokenPrompt(prompt.prompt_id, _token_ids(prompt, tokenizer), prompt.category, prompt.arrival_s)
        for prompt in prompts
    ]


def _token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if prompt.messages is None and prompt.text is None:
        raise ValueError(
            f"prompts: {prompt.prompt_id} must have a text, got only its length of {prompt.num_tokens} tokens; "
            "read the trace with qm-spec eval, which writes a text of that length"
        )
    if prompt.messages is None or (prompt.text is not None and not tokenizer.chat_template):
        return tuple(tokenizer(prompt.text, verbose=False)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError(
            f"prompts: {prompt.prompt_id} has messages, but the target's tokenizer has no chat template; "
            "pass rows with a 'text', or a target trained to chat"
        )
    return tuple(chat_token_ids(write_chat(prompt.messages, tokenizer, ask=True), tokenizer))


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
    return tuple(replace(prompt, token_ids=prompt.token_ids[:num_tokens]) for prompt in prompts)
