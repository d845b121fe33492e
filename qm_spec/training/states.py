"""The target's states of whole documents, kept on disk: several drafters train in the time of one target pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qm_spec.training.documents import Document

# Of the states behind the target's last norm, which its vocabulary head reads.
LAST = -1
# Tokens, padding included, that `TargetStates.keep` reads at a time. A CPU's caches hold the states of no more.
_TOKENS_PER_PASS, _TOKENS_PER_PASS_ON_CPU = 8192, 1024


@dataclass(frozen=True)
class Reading:
    """What a target says about documents.

    Attributes:
        aux_states: `[B, N, 3 D]` float32, of the layers asked for, side by side.
        logits: returns the target's logits `[n, V]` at the positions where a mask `[B, N]` is set; with a weight
            `[Vd, D]` in place of its vocabulary head, if one is given, `[n, Vd]`.
    """

    aux_states: Tensor
    logits: Callable[..., Tensor]


class TargetStates:
    """Reads documents with a frozen target, or from a folder where they were read before.

    Args:
        target: any causal LM of transformers that returns its hidden states.
        folder: one file per document and layer is kept there, in bfloat16 as in training on a GPU; safe for several
            processes, for one target only. None keeps nothing.
    """

    def __init__(self, target: PreTrainedModel, folder: Path | None = None) -> None:
        self.target, self.folder = target, folder
        self._has_plain_head: bool | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def read(self, input_ids: Tensor, layers: Sequence[int], lengths: Tensor | None = None) -> Reading:
        """Return the target's states of some documents and a function for its logits.

        Args:
            input_ids: `[B, N]` int64, padded on the right.
            layers: whose input states are wanted.
            lengths: `[B]`, tokens of each document; N for all when None.

        Raises:
            ValueError: logits are to come from kept states, and the target changes what its vocabulary head returns.
        """
        sizes = [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths.tolist()
        if self.folder is None:
            states = self._run(input_ids, [*layers, LAST])
        else:
            states = self._kept(input_ids, sizes, [*layers, LAST], self.folder)
        last = states[-1]

        @torch.no_grad()
        def logits(where: Tensor, weight: Tensor | None = None) -> Tensor:
            head = self.target.get_output_embeddings().weight if weight is None else weight
            return F.linear(last[where].to(head.dtype), head)

        @torch.no_grad()
        def capped_logits(where: Tensor, weight: Tensor | None = None) -> Tensor:
            every = self.target(input_ids=input_ids, use_cache=False).logits[where]
            if weight is None:
                return every
            raise ValueError(
                f"train: {type(self.target).__name__} changes what its vocabulary head returns (soft caps, scales), "
                "which a draft vocabulary does not know; leave --draft-vocab-size out"
            )

        return Reading(torch.cat(states[:-1], -1).float(), logits if self._has_plain_head else capped_logits)

    def keep(
        self, documents: Sequence[Document], layers: Sequence[int], on_progress: Callable[[int], None] = lambda n: None
    ) -> None:
        """Read every document that is not in the folder yet.

        Args:
            layers: whose input states are kept, beside the last one.
            on_progress: called with the number of tokens that were read.
        """
        assert self.folder is not None, "there is nowhere to keep states"
        batch: list[Document] = []
        most = _TOKENS_PER_PASS_ON_CPU if self.target.device.type == "cpu" else _TOKENS_PER_PASS
        for document in sorted(documents, key=lambda one: len(one.token_ids)):
            if batch and (len(batch) + 1) * len(document.token_ids) > most:
                self._keep(batch, layers, on_progress)
                batch = []
            batch.append(document)
        if batch:
            self._keep(batch, layers, on_progress)

    @torch.no_grad()
    def _keep(self, batch: list[Document], layers: Sequence[int], on_progress: Callable[[int], None]) -> None:
        assert self.folder is not None
        sizes = [len(document.token_ids) for document in batch]
        input_ids = torch.zeros(len(batch), max(sizes), dtype=torch.int64, device=self.target.device)
        for row, document in zip(input_ids, batch, strict=True):
            row[: len(document.token_ids)] = torch.from_numpy(document.token_ids.astype(np.int64))
        self._complete(input_ids, sizes, [*layers, LAST], self.folder)
        on_progress(sum(sizes))

    def _kept(self, input_ids: Tensor, sizes: Sequence[int], layers: Sequence[int], folder: Path) -> list[Tensor]:
        files = self._complete(input_ids, sizes, layers, folder)
        states = [input_ids.new_empty(0) for _ in layers]
        for place in range(len(layers)):
            each = [torch.from_numpy(np.load(some[place])).view(torch.bfloat16) for some in files]
            # Padding must be finite: a masked entry of the memory is multiplied by 0.
            padded = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
            states[place] = F.pad(padded, (0, 0, 0, input_ids.shape[1] - padded.shape[1])).to(input_ids.device)
        return states

    def _complete(
        self, input_ids: Tensor, sizes: Sequence[int], layers: Sequence[int], folder: Path
    ) -> list[list[Path]]:
        """Return each document's files, after reading those that are missing."""
        names = [
            hashlib.sha256(ids[:size].cpu().numpy().tobytes()).hexdigest()[:32]
            for ids, size in zip(input_ids, sizes, strict=True)
        ]
        files = [[folder / f"{name}.{layer}.npy" for layer in layers] for name in names]
        missing = [number for number, some in enumerate(files) if not all(file.is_file() for file in some)]
        if missing:
            longest = max(sizes[number] for number in missing)
            states = self._run(input_ids[missing, :longest], layers)
            if not self._has_plain_head:
                raise ValueError(
                    f"train: {type(self.target).__name__} changes what its vocabulary head returns (soft caps, "
                    "scales), so its logits cannot be had from kept states; leave --states out"
                )
            for place, number in enumerate(missing):
                for file, state in zip(files[number], states, strict=True):
                    self._save(file, state[place, : sizes[number]])
        self._has_plain_head = True
        return files

    def _run(self, input_ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return the states `[B, N, D]` of each layer; note whether logits are the head's products with the last."""
        out = self.target(input_ids=input_ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        states = [out.hidden_states[layer].to(input_ids.device) for layer in layers]
        if self._has_plain_head is None:
            head = self.target.get_output_embeddings()
            expected = out.logits[:, -1].float()
            got = head(out.hidden_states[LAST][:, -1].to(head.weight.dtype)).float()
            # A wrong head is off by far more than another order of summation is.
            self._has_plain_head = bool((got - expected).norm() <= 1e-2 * expected.norm())
        return states

    @staticmethod
    def _save(file: Path, state: Tensor) -> None:
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        with unfinished.open("wb") as out:
            np.save(out, state.to(torch.bfloat16).view(torch.int16).cpu().numpy())
        os.replace(unfinished, file)
