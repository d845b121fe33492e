"""Text that the target writes itself, as training data for its drafter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import PreTrainedModel

PROMPT_SHARE = 0.25
# Greedy decoding is what latency is most often measured on; sampling keeps the text varied.
TEMPERATURES = (0.0, 0.7, 0.0, 1.0)


@torch.no_grad()
def regenerate(
    target: PreTrainedModel,
    token_ids: np.ndarray,
    length: int,
    num_tokens: int,
    work_dir: Path,
    seed: int,
    batch_size: int = 64,
) -> np.ndarray:
    """Let the target continue passages of the data, greedily and by sampling in turn.

    Finished batches are kept in `work_dir`, so that a run that was stopped goes on from there.

    Args:
        target: a causal LM.
        token_ids: `[N]` int32, text to take the prompts from.
        length: tokens per window; the first quarter is the prompt.
        num_tokens: tokens in all, rounded up to whole batches.
        work_dir: where finished batches go.
        seed: of the passages and of sampling.
        batch_size: windows written at a time.

    Returns:
        `[windows, length]` int32.

    Raises:
        ValueError: the text is shorter than one prompt.
    """
    prompt_length = max(1, int(length * PROMPT_SHARE))
    if len(token_ids) <= prompt_length:
        raise ValueError(f"regenerate: {len(token_ids)} tokens do not fill a prompt of {prompt_length}")
    batches = []
    for number in track(range(-(-num_tokens // (batch_size * length))), "the target writes"):
        file = work_dir / f"regenerated-{length}-{seed}-{number}.npy"
        if not file.is_file():
            rng = np.random.default_rng((seed, number))
            starts = rng.integers(0, len(token_ids) - prompt_length, batch_size)
            prompts = np.stack([token_ids[start : start + prompt_length] for start in starts])
            temperature = TEMPERATURES[number % len(TEMPERATURES)]
            torch.manual_seed(int(rng.integers(2**31)))
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
            ids = torch.from_numpy(prompts.astype(np.int64)).to(target.device)
            out = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=length - prompt_length,
                max_new_tokens=length - prompt_length,
                # A model that was saved in the middle of training says no.
                use_cache=True,
                **(sampling or {"do_sample": False}),
            )
            # A batch is complete or absent: it is written aside and renamed.
            partial = file.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, out.cpu().numpy().astype(np.int32))
            partial.rename(file)
        batches.append(np.load(file))
    return np.concatenate(batches)
