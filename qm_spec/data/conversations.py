"""Whole conversations with the assistant's answers, as token ids with a mask of what is to be learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from qm_spec.data.chat import Message, chat_token_ids, is_message, write_chat
from qm_spec.data.json_lines import OnSkip, Row, find_row_files, read_rows, say_nothing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Roles by the names that ShareGPT's exports use.
_ROLES = {
    "assistant": "assistant",
    "chatgpt": "assistant",
    "gpt": "assistant",
    "human": "user",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "user": "user",
}


@dataclass(frozen=True)
class MaskedConversation:
    """A conversation as a target's token ids.

    Args:
        token_ids: up to the end of the last answer.
        answer_mask: as long as `token_ids`; True for the assistant's words and the token that ends its turn.
        category: task that it belongs to, None where its file names none.
    """

    token_ids: tuple[int, ...]
    answer_mask: tuple[bool, ...]
    category: str | None = None


def read_conversations(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    skip_bad_lines: bool = False,
    on_skip: OnSkip = say_nothing,
) -> Iterator[MaskedConversation]:
    """Yield the conversations of files of OpenAI `messages` or ShareGPT's `conversations`.

    Left out are a conversation without an answer, one that the chat template does not take, and of one that is too
    long the turns behind the last answer that fits.

    Args:
        paths: files of rows, see `read_rows`, and folders of them.
        tokenizer: the target's; its chat template writes the conversation. An answer is what the template adds between
            the prompt for it and the turn's last special token. Where the template writes earlier turns in another way
            than the last one, as those that drop its thinking do, only answers that stand as they were given count.
        max_tokens: of a conversation; None for any length.
        skip_bad_lines: leave lines out that hold no conversation, instead of refusing the file.
        on_skip: takes the message about each row that is left out or shortened.

    Raises:
        FileNotFoundError: see `find_row_files`.
        ValueError: the tokenizer has no chat template, or a line holds no conversation (the message has its number).
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "data: conversations need a target whose tokenizer has a chat template, got one without; pass rows with "
            "a 'text', or put the template beside the target as chat_template.jinja"
        )
    return _read(find_row_files(paths), tokenizer, max_tokens, skip_bad_lines, on_skip)


def _read(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    skip_bad_lines: bool,
    on_skip: OnSkip,
) -> Iterator[MaskedConversation]:
    for file in files:
        for number, row in read_rows(file, on_skip if skip_bad_lines else None):
            place = f"{file}:{number}"
            try:
                messages = messages_from_row(row, place)
            except ValueError as error:
                if not skip_bad_lines:
                    raise
                on_skip(str(error))
                continue
            try:
                masked = mask_answers(messages, tokenizer, max_tokens)
            except ValueError as error:
                on_skip(f"{place}: {error}")
                continue
            if masked.num_dropped:
                on_skip(f"{place}: behind token {max_tokens} lie, left out, the last answers: {masked.num_dropped}")
            category = row.get("category")
            yield MaskedConversation(
                masked.token_ids, masked.answer_mask, category if isinstance(category, str) else None
            )


def messages_from_row(row: Row, place: str) -> list[Message]:
    """Return a row's conversation as OpenAI messages.

    Raises:
        ValueError: the row has neither `messages` nor `conversations`, or a turn without a known role and a content.
    """
    for name, role_name, content_name in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = row.get(name)
        if not isinstance(turns, list):
            continue
        if name == "messages" and all(is_message(turn) for turn in turns):
            return turns
        if all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
            roles = [_ROLES.get(turn.get("from")) for turn in turns]
            if all(roles):
                return [{"role": role, "content": turn["value"]} for role, turn in zip(roles, turns, strict=True)]
        raise ValueError(
            f"data: {place} must have {name} each with a '{role_name}' and a '{content_name}', got {repr(turns)[:80]}"
        )
    raise ValueError(
        f"data: {place} must have a list of 'messages' (OpenAI) or 'conversations' (ShareGPT), got only {sorted(row)}"
    )


@dataclass(frozen=True)
class _Masked:
    token_ids: tuple[int, ...]
    answer_mask: tuple[bool, ...]
    num_dropped: int


def mask_answers(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> _Masked:
    """Write a conversation with the chat template and mark the answers; see `read_conversations`.

    Raises:
        ValueError: there is no answer, none fits, or the template does not take the conversation.
    """
    last = max((number for number, one in enumerate(messages) if _is_answer(one)), default=None)
    if last is None:
        raise ValueError("the conversation must have an answer that is not empty, got none")
    text = write_chat(messages[: last + 1], tokenizer)
    token_ids = chat_token_ids(text, tokenizer)
    spans = []
    for number, message in enumerate(messages[: last + 1]):
        # What opens a conversation answers nothing.
        if not number or not _is_answer(message):
            continue
        before, asked = (write_chat(messages[:number], tokenizer, ask=ask) for ask in (False, True))
        told = write_chat(messages[: number + 1], tokenizer)
        if text.startswith(told) and told.startswith(before) and asked.startswith(before):
            begin = _common_length(token_ids, chat_token_ids(asked, tokenizer))
            end = _common_length(token_ids, chat_token_ids(told, tokenizer))
            spans.append((begin, _behind_last_special(token_ids, begin, end, tokenizer)))
    if not spans:
        raise ValueError("an answer must follow a turn and stand as the template writes a last turn, none does")
    fitting = [span for span in spans if max_tokens is None or span[1] <= max_tokens]
    if not fitting:
        raise ValueError(f"prompt and first answer must fit {max_tokens} tokens, got {spans[0][1]}")
    mask = [False] * fitting[-1][1]
    for begin, end in fitting:
        mask[begin:end] = [True] * (end - begin)
    return _Masked(tuple(token_ids[: len(mask)]), tuple(mask), len(spans) - len(fitting))


def _is_answer(message: Message) -> bool:
    content = message["content"]
    return message["role"] == "assistant" and bool(content.strip() if isinstance(content, str) else content)


def _common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """Count the tokens that two texts begin with alike: a token across the border belongs to what follows it."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))


def _behind_last_special(ids: Sequence[int], begin: int, end: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Leave out what the template writes between the token that ends a turn and the next turn."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((place for place in range(end, begin, -1) if ids[place - 1] in special), end)
