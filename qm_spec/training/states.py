"""The target's states of whole windows, kept on disk: several drafters train in the time of one target pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

# Of the states behind the target's last norm, which its vocabulary head reads.
LAST = -1


class TargetStates:
    """Reads windows with a frozen target, or from a folder where they were read before.

    Args:
        target: any causal LM of transformers that returns its hidden states.
        folder: one file per window and layer is kept there, in bfloat16 as in training on a GPU; safe for several
            processes, for one target only. None keeps nothing.
    """

    def __init__(self, target: PreTrainedModel, folder: Path | None = None) -> None:
        self.target, self.folder = target, folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def read(self, input_ids: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what the target holds at each position of some windows.

        Args:
            input_ids: `[B, N]` int64.
            layers: whose input states are wanted.

        Returns:
            These states side by side `[B, N, len(layers) D]`, and the input of the vocabulary head `[B, N, D]`;
            float32.
        """
        wanted = [*layers, LAST]
        states = self._run(input_ids, wanted) if self.folder is None else self._kept(input_ids, wanted, self.folder)
        return torch.cat(states[:-1], -1), states[-1]

    def _run(self, input_ids: Tensor, layers: Sequence[int]) -> list[Tensor]:
        out = self.target(input_ids=input_ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        return [out.hidden_states[layer].float() for layer in layers]

    def _kept(self, input_ids: Tensor, layers: Sequence[int], folder: Path) -> list[Tensor]:
        rows = []
        for window in input_ids:
            digest = hashlib.sha256(window.cpu().numpy().tobytes()).hexdigest()[:32]
            files = [folder / f"{digest}.{layer}.npy" for layer in layers]
            if not all(file.is_file() for file in files):
                for file, state in zip(files, self._run(window[None], layers), strict=True):
                    self._save(file, state[0])
            rows.append([torch.from_numpy(np.load(file)).view(torch.bfloat16) for file in files])
        return [torch.stack(state).to(input_ids.device).float() for state in zip(*rows, strict=True)]

    @staticmethod
    def _save(file: Path, state: Tensor) -> None:
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        with unfinished.open("wb") as out:
            np.save(out, state.to(torch.bfloat16).view(torch.int16).cpu().numpy())
        os.replace(unfinished, file)
