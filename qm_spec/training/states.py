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

from qm_spec.drafter.rows import read_target

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
        """Return what `read_target` returns for some windows.

        Args:
            input_ids: `[B, N]` int64.
            layers: whose input states are wanted.

        Returns:
            These states side by side `[B, N, len(layers) D]` float32, and the target's logits `[B, N, V]`.

        Raises:
            ValueError: logits are to come from kept states, and the target changes what its vocabulary head returns.
        """
        if self.folder is None:
            return read_target(self.target, input_ids, layers)
        states = self._kept(input_ids, [*layers, LAST], self.folder)
        return torch.cat(states[:-1], -1), self._head(states[-1])

    def _head(self, last_states: Tensor) -> Tensor:
        head = self.target.get_output_embeddings()
        return head(last_states.to(head.weight.dtype))

    def _kept(self, input_ids: Tensor, layers: Sequence[int], folder: Path) -> list[Tensor]:
        rows = []
        for window in input_ids:
            digest = hashlib.sha256(window.cpu().numpy().tobytes()).hexdigest()[:32]
            files = [folder / f"{digest}.{layer}.npy" for layer in layers]
            if not all(file.is_file() for file in files):
                for file, state in zip(files, self._read_window(window, layers), strict=True):
                    self._save(file, state)
            rows.append([torch.from_numpy(np.load(file)).view(torch.bfloat16) for file in files])
        return [torch.stack(state).to(input_ids.device).float() for state in zip(*rows, strict=True)]

    def _read_window(self, window: Tensor, layers: Sequence[int]) -> Sequence[Tensor]:
        """Return the states `[N, D]` of each layer, the last of which the vocabulary head is known to read."""
        states, logits = read_target(self.target, window[None], layers, logits_to_keep=1)
        each = states[0].chunk(len(layers), -1)
        expected, got = logits[0, -1].float(), self._head(each[-1][-1]).float()
        # A wrong head is off by far more than another order of summation is.
        if (got - expected).norm() > 1e-2 * expected.norm():
            raise ValueError(
                f"train: {type(self.target).__name__} changes what its vocabulary head returns (soft caps, scales), so "
                "its logits cannot be had from kept states; leave --states out"
            )
        return each

    @staticmethod
    def _save(file: Path, state: Tensor) -> None:
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        with unfinished.open("wb") as out:
            np.save(out, state.to(torch.bfloat16).view(torch.int16).cpu().numpy())
        os.replace(unfinished, file)
