"""A short tour of the compressor: compress, unmerge, predict, losses, budgets, chunks. Needs a few seconds."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if find_spec("qm_spec") is None:
    # A clone that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qm_spec import QuickMergePP
from qm_spec.quickmerge import effective_tokens, unmerge

LAYERS, BATCH, TOKENS, DIM, KEEP = 4, 2, 128, 64, 32


class Row(NamedTuple):
    """One line of the tour: the call, a quantity and its value."""

    call: str
    quantity: str
    value: float | list[int]


def topics(repetitive: int, varied: int) -> Tensor:
    """Return states `[L, 2, N, D]` of two sequences whose tokens circle around so many topics."""
    states = torch.empty(LAYERS, BATCH, TOKENS, DIM)
    for sequence, count in enumerate((repetitive, varied)):
        centres = torch.randn(count, DIM)
        states[:, sequence] = centres[torch.arange(TOKENS) % count] + 0.1 * torch.randn(LAYERS, TOKENS, DIM)
    return states


def error(tokens: Tensor, rebuilt: Tensor) -> float:
    """Return `||X - X'||^2 / ||X||^2`."""
    return ((tokens - rebuilt).square().sum() / tokens.square().sum()).item()


def tour() -> list[Row]:
    """Run every step and return what it gave."""
    torch.manual_seed(0)
    states = topics(repetitive=8, varied=64)
    tokens = states[-1]
    rows: list[Row] = []

    # Compress: N tokens become K, in the order of the sequence. Nothing is random.
    compressor = QuickMergePP(dim=DIM, k_max=KEEP).eval()
    merged, info = compressor.compress(states)
    rows.append(Row("compress(h)", "shape of h", list(states.shape)))
    rows.append(Row("", "shape of the merged tokens", list(merged.shape)))
    rows.append(Row("", "tokens in the largest group", int(info["sizes"].max())))

    # Unmerge: every token gets its group's merged token back.
    rebuilt = unmerge(merged, info["assignments"])
    for sequence, name in enumerate(("repetitive", "varied")):
        rows.append(Row("unmerge", f"error, {name} sequence", error(tokens[sequence], rebuilt[sequence])))
    kmeans, kmeans_info = QuickMergePP(dim=DIM, k_max=KEEP, grouping="kmeans").eval().compress(states)
    rows.append(Row('grouping="kmeans"', "error, both", error(tokens, unmerge(kmeans, kmeans_info["assignments"]))))
    rows.append(Row('grouping="cosine"', "error, both", error(tokens, rebuilt)))

    # Predict: row i of the prior's output is of merged token i + 1. Here it is not trained.
    predicted = compressor.ar_predict(merged, info["sizes"])
    rows.append(Row("ar_predict", "shape of the predictions", list(predicted.shape)))

    # Losses: a few steps of training lower them; all of them have gradients.
    learner = QuickMergePP(dim=DIM, saliency="learned", prior_layers=2)
    optimizer = torch.optim.AdamW(learner.parameters(), 3e-3)
    for step in range(41):
        _, losses = learner(tokens, KEEP)
        if step in (0, 40):
            rows += [Row(f"losses, step {step}", name, loss.item()) for name, loss in losses.items()]
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()

    # Budgets: a repetitive sequence needs fewer tokens than a varied one.
    rows.append(Row("effective_tokens", "per sequence", effective_tokens(tokens).round().int().tolist()))
    _, info = QuickMergePP(dim=DIM, k_max=KEEP, budget="entropy").eval().compress(states)
    rows.append(Row('budget="entropy"', "tokens kept per sequence", info["mask"].sum(1).tolist()))

    # Chunks: 4 of every 16 tokens, so that a sequence can be compressed while it grows.
    stream = QuickMergePP(dim=DIM, k_max=4, chunk_size=16, causal=True).eval()
    whole, _ = stream.compress(states)
    start, _ = stream.compress(states[:, :, :64])
    rows.append(Row("chunk_size=16", "shape of the merged tokens", list(whole.shape)))
    rows.append(Row("", "change of the first 64 by the last 64", (whole[:, :16] - start).abs().max().item()))
    return rows


def main() -> None:
    """Print the tour as a table; with `--json` also write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    arguments = parser.parse_args()
    rows = tour()
    cells = [
        (row.call, row.quantity, f"{row.value:.4f}" if isinstance(row.value, float) else str(row.value)) for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    for line in cells:
        print(f"{line[0]:{widths[0]}}  {line[1]:{widths[1]}}  {line[2]:>{widths[2]}}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
