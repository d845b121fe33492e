"""Prompts in the shapes in which they are published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, TypeGuard

from qm_spec.data.chat import Message, is_message
from qm_spec.data.json_lines import Row

_IDS = ("id", "question_id", "task_id", "_id")
# Names that ShareGPT's exports use for the person's turns.
_HUMAN = ("human", "user")


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was written: a text, a conversation, or for rows of a trace a length alone.

    Args:
        prompt_id: the row's own id, else its line number.
        text: running text; beside `messages` the form for a tokenizer without a chat template.
        messages: OpenAI messages; None for running text.
        category: task that it belongs to; None where the file names none.
        arrival_s: when a trace's request came in, in seconds; None where there is no trace.
        num_tokens: length of a request whose text the trace does not give.
    """

    prompt_id: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    category: str | None = None
    arrival_s: float | None = None
    num_tokens: int | None = None


def prompt_from_row(row: Row, number: int, place: str) -> Prompt | None:
    """Return the prompt that a row holds, None for a conversation in which no person says anything.

    The shapes, first match first: `text` or `prompt`; OpenAI `messages`, without the answers at their end; Spec-Bench's
    and MT-bench's `turns`, of which the first is taken, since the second needs an answer to the first; ShareGPT's
    `conversations`, up to the first turn of the person; GSM8K's `question` and `answer`; LongBench's `context` and
    `input`; `input_length`.

    Raises:
        ValueError: the row has none of these shapes, or a time of arrival that is none.
    """
    for shape in _SHAPES:
        found = shape(row)
        if found is not None:
            break
    else:
        if isinstance(row.get("conversations"), list) or _are_messages(row.get("messages")):
            return None
        raise ValueError(
            f"prompts: {place} must have a 'text' or 'prompt' string or a list of 'messages' with role and content "
            "(or the fields of Spec-Bench, ShareGPT, GSM8K, LongBench or a trace with input_length), "
            f"got only {sorted(row)}"
        )
    prompt_id = own_id(row) or str(number)
    category = row.get("category", row.get("dataset"))
    return replace(
        found,
        prompt_id=prompt_id,
        category=category if isinstance(category, str) else None,
        arrival_s=_arrival(row, place),
    )


def own_id(row: Row) -> str | None:
    """Return the id that a row gives itself, None for none."""
    return next((str(row[name]) for name in _IDS if name in row), None)


def _text(row: Row) -> Prompt | None:
    for field in ("text", "prompt"):
        if isinstance(row.get(field), str) and row[field]:
            return Prompt("", text=row[field])
    return None


def _messages(row: Row) -> Prompt | None:
    messages = row.get("messages")
    if not _are_messages(messages):
        return None
    # The answers at the end are what is to be generated.
    asked = next((end for end in range(len(messages), 0, -1) if messages[end - 1]["role"] != "assistant"), 0)
    return Prompt("", messages=tuple(messages[:asked])) if asked else None


def _are_messages(value: Any) -> TypeGuard[list[Message]]:
    return isinstance(value, list) and bool(value) and all(is_message(one) for one in value)


def _turns(row: Row) -> Prompt | None:
    turns = row.get("turns")
    return _said(turns[0]) if isinstance(turns, list) and turns and isinstance(turns[0], str) else None


def _said(question: str, plain: str | None = None) -> Prompt:
    return Prompt("", text=plain or question, messages=({"role": "user", "content": question},))


def _conversations(row: Row) -> Prompt | None:
    turns = row.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("from") in _HUMAN and isinstance(turn.get("value"), str):
            return _said(turn["value"]) if turn["value"].strip() else None
    return None


def _question(row: Row) -> Prompt | None:
    question = row.get("question")
    if not isinstance(question, str) or "answer" not in row:
        return None
    return _said(question, f"Question: {question}\nAnswer:")


def _context(row: Row) -> Prompt | None:
    context, asked = row.get("context"), row.get("input")
    return _said(f"{context}\n\n{asked}") if isinstance(context, str) and isinstance(asked, str) else None


def _length(row: Row) -> Prompt | None:
    length = row.get("input_length")
    return Prompt("", num_tokens=length) if isinstance(length, int) and length > 0 else None


_SHAPES: tuple[Callable[[Row], Prompt | None], ...] = (
    _text,
    _messages,
    _turns,
    _conversations,
    _question,
    _context,
    _length,
)


def _arrival(row: Row, place: str) -> float | None:
    """Read `arrival_s` in seconds, or `timestamp`: a number in milliseconds, as Mooncake's traces, or an ISO time."""
    seconds, stamp = row.get("arrival_s"), row.get("timestamp")
    try:
        if seconds is not None:
            return float(seconds)
        if isinstance(stamp, str):
            moment = datetime.fromisoformat(stamp)
            return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        return None if stamp is None else float(stamp) / 1000
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"prompts: {place} must have arrival_s in seconds or timestamp in milliseconds or as an ISO time, got "
            f"{seconds if seconds is not None else stamp!r}"
        ) from error
