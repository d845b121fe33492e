"""Prompts of a real chat model at several lengths: one text of each kind, cut, between one opening and one question."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qm_spec.data.answers import Answered

DATA = Path(__file__).parent / "data"
SPEC_BENCH = DATA / "spec_bench.jsonl"

# What is said before and after the text.
REQUESTS = {
    "summary": ("Summarize the following articles.\n\n", "\n\nSummarize each of the articles above."),
    "rag": ("Answer the question with the help of these documents.\n\n", "\n\nQuestion: {question}"),
    "book": (
        "Summarize the following passage in detail, naming the characters and what each of them does.\n\n",
        "\n\nWho are the characters, and what does each of them do?",
    ),
    "code": (
        "Rewrite the following Python code with type hints. Keep all names.\n\n```python\n",
        "\n```\n\nBegin with the first function or class.",
    ),
    "dialogue": (
        "Read this dialogue.\n\n",
        "\n\nWhat did the user ask first, what was answered, and what came after it?",
    ),
}
# Characters of a book that are passed over: its title, contents and preface.
BOOK_FRONT = 20_000


@dataclass(frozen=True)
class LongText:
    """A text that prompts of several lengths are cut from; all begin and end alike.

    Attributes:
        head: token ids of the chat template's opening and of what is asked.
        body: token ids of the text.
        tail: token ids of the question and of the chat template's end.
    """

    head: tuple[int, ...]
    body: tuple[int, ...]
    tail: tuple[int, ...]

    def prompt(self, length: int) -> list[int]:
        """Return `length` token ids.

        Raises:
            ValueError: the text is too short for that, or the length for head and tail.
        """
        room = length - len(self.head) - len(self.tail)
        if not 0 < room <= len(self.body):
            raise ValueError(f"a prompt of {length} tokens needs {room} tokens of text, got {len(self.body)}")
        return [*self.head, *self.body[:room], *self.tail]


class LongTexts:
    """The texts of all kinds, drawn anew for each number.

    Args:
        tokenizer: of the target, with its chat template.
        longest: tokens of the longest prompt.
        books: plain-text files; without them there is no kind `book`.
        dialogues: folder of the target's own answers, as `qm-spec data` writes it.
        fingerprint: of the target, which `dialogues` is checked against.
        seed: of the draws.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        books: Sequence[Path],
        dialogues: Path,
        fingerprint: str,
        seed: int,
    ) -> None:
        self._tokenizer, self._longest, self._seed = tokenizer, longest, seed
        self._books, self._dialogues, self._fingerprint = books, dialogues, fingerprint
        self._writers: dict[str, Callable[[Random], tuple[Iterator[str], str]]] = {
            "summary": self._summary,
            "rag": self._rag,
            "book": self._book,
            "code": self._code,
            "dialogue": self._dialogue,
        }

    def write(self, kind: str, number: int) -> LongText:
        """Return a text of a kind, one of `REQUESTS`; the same for the same number and seed.

        Raises:
            ValueError: the material is shorter than the longest prompt.
        """
        pieces, question = self._writers[kind](Random(f"{self._seed} {kind} {number}"))
        opening, closing = REQUESTS[kind]
        mark = "\0"
        content = opening + mark + closing.format(question=question)
        chat = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        before, after = str(chat).split(mark)
        body: list[int] = []
        for piece in pieces:
            body += self._ids(piece)
            if len(body) >= self._longest:
                break
        else:
            raise ValueError(f"{kind}: the material has {len(body)} tokens, and {self._longest} are asked for")
        return LongText(tuple(self._ids(before)), tuple(body), tuple(self._ids(after)))

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _turns(self, category: str) -> list[str]:
        rows = map(json.loads, SPEC_BENCH.read_text(encoding="utf-8").splitlines())
        return [row["turns"][0] for row in rows if row["category"] == category]

    def _summary(self, rng: Random) -> tuple[Iterator[str], str]:
        articles = self._turns("summarization")
        rng.shuffle(articles)
        return (f"{article.removeprefix('Summarize: ')}\n\n" for article in articles), ""

    def _rag(self, rng: Random) -> tuple[Iterator[str], str]:
        # The last line is the question; that of the first document is asked, which stands farthest.
        parts = [turn.rstrip().rpartition("\n") for turn in self._turns("rag")]
        rng.shuffle(parts)
        return (f"{documents}\n\n" for documents, _, _ in parts), parts[0][2]

    def _book(self, rng: Random) -> tuple[Iterator[str], str]:
        if not self._books:
            raise ValueError("book: name files with --books")
        text = rng.choice(self._books).read_text(encoding="utf-8", errors="replace")
        begin = rng.randrange(min(BOOK_FRONT, len(text) // 4), len(text) // 2)
        begin = text.find("\n\n", begin) + 2
        return iter([text[begin : begin + 8 * self._longest]]), ""

    def _code(self, rng: Random) -> tuple[Iterator[str], str]:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        rng.shuffle(files)
        return (f"{file.read_text(encoding='utf-8', errors='replace')}\n\n" for file in files), ""

    @cached_property
    def _answers(self) -> list[Answered]:
        from qm_spec.data.answers import read_answers

        return list(read_answers([self._dialogues], fingerprint=self._fingerprint))

    def _dialogue(self, rng: Random) -> tuple[Iterator[str], str]:
        answers = rng.sample(self._answers, len(self._answers))

        def turns() -> Iterator[str]:
            for one in answers:
                asked = self._tokenizer.decode(one.prompt_token_ids, skip_special_tokens=True)
                # The chat template names the roles in lines of their own.
                question = asked.rpartition("user\n")[2].removesuffix("assistant\n")
                answer = self._tokenizer.decode(one.output_token_ids, skip_special_tokens=True)
                yield f"User: {question.strip()}\n\nAssistant: {answer.strip()}\n\n"

        return turns(), ""
