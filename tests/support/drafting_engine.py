"""A double of an engine's drafting: what each request has read and what is drafted for it, without any drafter."""

from __future__ import annotations

from dataclasses import MISSING
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qm_spec.integrations.vllm_plugin import session as drafting
from qm_spec.integrations.vllm_plugin.session import Drafts, DraftSession
from qm_spec.integrations.vllm_plugin.step import DraftStep

NUM_DRAFTS, MOST_DRAFTS = 4, 16
PROMPT = 10


def request(**extra: Any) -> Any:
    """What is read of a request of vLLM's, with a prompt of `PROMPT` tokens and these extra arguments."""
    sampling = SimpleNamespace(max_tokens=100, extra_args=extra or None)
    return SimpleNamespace(num_prompt_tokens=PROMPT, sampling_params=sampling)


class Engine:
    """A session that drafts token 7 as often as it has decided to.

    Args:
        monkeypatch: undoes what is replaced.
        found: what lookup finds for each request.
        settings: of the session.

    Attributes:
        widths: of each step, the tokens drafted for each request.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: Any = (), **settings: Any) -> None:
        self.session = DraftSession(None, None, NUM_DRAFTS, MOST_DRAFTS, **settings)
        self.widths: list[list[int]] = []

        def propose(step: Any, widths: Any, found: Any = ()) -> Drafts:
            self.widths.append([*widths])
            return Drafts([[7] * width for width in widths], None)

        monkeypatch.setattr(drafting, "look_up", lambda step, length, responses: found)
        monkeypatch.setattr(self.session, "propose", propose)
        # There are no pages.
        monkeypatch.setattr(self.session, "_put_off", lambda step: None)

    def step(self, requests: list[Any], rows: list[int], rejected: list[int], lengths: list[int]) -> Any:
        """Draft behind a step in which each request has read so many rows, up to so many tokens."""
        states = {str(id(one)): one for one in requests}
        self.session.note_batch([*states], states)
        unread = {name: None for name, field in DraftStep.__dataclass_fields__.items() if field.default is MISSING}
        read: dict[str, Any] = {
            "num_drafts": MOST_DRAFTS,
            "next_token_ids": torch.full((len(rows),), 7),
            "query_start_loc": torch.tensor([0, *rows]).cumsum(0),
            "num_rejected": torch.tensor(rejected),
            "seq_lens": torch.tensor(lengths),
            "requests": self.session.batch,
        }
        return self.session.draft(DraftStep(**{**unread, **read}))
