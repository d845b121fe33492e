"""k-means micro-benchmark: qm_spec's grouping against a plain Lloyd's in PyTorch, SciPy's and scikit-learn's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from script import run_main, with_plain_errors
from torch import Tensor

# B, N, D, K.
SHAPES = "4x512x128x128,1x2048x128x256,1x8192x64x512"

EXAMPLES = """
Examples:

    python benchmarks/bench_kmeans.py

    python benchmarks/bench_kmeans.py --shapes 8x1024x256x64 --iterations 10 --device cpu
"""


def lloyd(points: Tensor, seeds: Tensor, iterations: int) -> Tensor:
    """Return the clusters `[B, N]` of plain k-means: distances of all pairs, then means by a one-hot product.

    Args:
        points: `[B, N, D]`.
        seeds: `[B, K]` int64, the tokens at which the centres begin.
        iterations: always all of them; a cluster that runs empty keeps its centre.
    """
    centres = points.gather(1, seeds.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
    for _ in range(iterations):
        cluster = torch.cdist(points, centres).argmin(-1)
        member = torch.nn.functional.one_hot(cluster, seeds.shape[1]).to(points.dtype)
        count = member.sum(1).unsqueeze(-1)
        centres = torch.where(count > 0, member.mT @ points / count.clamp_min(1), centres)
    return cluster


def quickmerge(points: Tensor, seeds: Tensor, iterations: int) -> Tensor:
    """Return the clusters of `group_by_kmeans`, all tokens of the same mass."""
    from qm_spec.quickmerge import Selection, group_by_kmeans

    mass = torch.ones_like(points[..., 0])
    live = torch.ones_like(seeds, dtype=torch.bool)
    return group_by_kmeans(points, Selection(seeds, live, mass, mass), num_iterations=iterations).cluster


def scipy(points: Tensor, seeds: Tensor, iterations: int) -> Tensor:
    """Return the clusters of `scipy.cluster.vq.kmeans2`, one sequence after the other."""
    kmeans2 = import_module("scipy.cluster.vq").kmeans2
    found = [
        kmeans2(x.numpy(), x[seed].numpy(), iter=iterations, minit="matrix", missing="warn")[1]
        for x, seed in zip(points, seeds, strict=True)
    ]
    return torch.stack([torch.from_numpy(cluster).long() for cluster in found])


def sklearn(points: Tensor, seeds: Tensor, iterations: int) -> Tensor:
    """Return the clusters of `sklearn.cluster.KMeans`, one sequence after the other."""
    kmeans = import_module("sklearn.cluster").KMeans
    found = [
        kmeans(seeds.shape[1], init=x[seed].numpy(), n_init=1, max_iter=iterations, tol=0).fit_predict(x.numpy())
        for x, seed in zip(points, seeds, strict=True)
    ]
    return torch.stack([torch.from_numpy(cluster).long() for cluster in found])


def error(points: Tensor, cluster: Tensor, num_clusters: int) -> float:
    """Return the squared distances to the clusters' means over those to the mean of all; lower = better."""
    member = torch.nn.functional.one_hot(cluster, num_clusters).to(points.dtype)
    means = member.mT @ points / member.sum(1).unsqueeze(-1).clamp_min(1)
    within = (points - member @ means).square().sum()
    return (within / (points - points.mean(1, keepdim=True)).square().sum()).item()


def elapsed_ms(action: Callable[[], Any], device: str) -> float:
    """Time one call; on CUDA until its work is done."""
    begin = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin)


def clustered_points(batch: int, num_tokens: int, dim: int, num_clusters: int, device: str) -> tuple[Tensor, Tensor]:
    """Return points `[B, N, D]` around K/2 means, and K evenly spaced seeds `[B, K]`; the same at every call."""
    random = torch.Generator().manual_seed(0)
    means = torch.randn(batch, max(1, num_clusters // 2), dim, generator=random)
    own = torch.randint(means.shape[1], (batch, num_tokens), generator=random)
    points = means.gather(1, own.unsqueeze(-1).expand(-1, -1, dim))
    points = points + 0.5 * torch.randn(batch, num_tokens, dim, generator=random)
    seeds = (torch.arange(num_clusters) * num_tokens // num_clusters).expand(batch, -1)
    return points.to(device), seeds.to(device)


def measure(shape: tuple[int, int, int, int], device: str, iterations: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per method at one shape; the methods take turns, so that all meet the same load."""
    points, seeds = clustered_points(*shape, device)
    methods: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"qm_spec": quickmerge, "torch Lloyd": lloyd}
    if device == "cpu":
        methods |= {name: method for name, method in (("scipy", scipy), ("sklearn", sklearn)) if find_spec(name)}
    actions = {name: partial(method, points, seeds, iterations) for name, method in methods.items()}
    errors = {name: error(points, action(), shape[3]) for name, action in actions.items()}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(elapsed_ms(action, device))
    plain = statistics.median(times["torch Lloyd"])
    return [
        {
            "device": device,
            "batch": shape[0],
            "tokens": shape[1],
            "dim": shape[2],
            "clusters": shape[3],
            "method": name,
            "time_ms": statistics.median(times[name]),
            "time_ms_min": min(times[name]),
            "speed_over_torch_lloyd": plain / statistics.median(times[name]),
            "error": errors[name],
        }
        for name in methods
    ]


@with_plain_errors
def main(
    shapes: Annotated[str, typer.Option(metavar="BxNxDxK,...", help="Batch, tokens, dimension, clusters.")] = SHAPES,
    device: Annotated[str, typer.Option(help="cpu, cuda, or both where there is a GPU (auto).")] = "auto",
    iterations: Annotated[int, typer.Option(min=1, help="Of Lloyd's algorithm.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each method, in turn.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on the CPU; its own choice by default.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results.")] = Path("results/bench_kmeans.json"),
) -> None:
    """Time k-means from the same seeds, and say how well each clusters.

    "error" is the sum of squared distances to the clusters' means over that to the mean of all points.
    qm_spec's ends when nothing changes, and leaves no cluster empty.
    """
    from qm_spec import provenance
    from qm_spec.bench.environment import describe_environment
    from qm_spec.bench.results.table import align_table

    if threads is not None:
        torch.set_num_threads(threads)
    rows = []
    for text in shapes.split(","):
        shape = parse_shape(text)
        for place in devices(device):
            rows += measure(shape, place, iterations, repeats)
    results = {
        **provenance.conditions(),
        "environment": describe_environment() | {"threads": torch.get_num_threads()},
        "iterations": iterations,
        "repeats": repeats,
        "rows": rows,
    }
    provenance.write_record(out, results)
    header = ["B x N x D, K", "device", "method", "ms", "over torch Lloyd", "error"]
    body = [
        [
            f"{row['batch']} x {row['tokens']} x {row['dim']}, {row['clusters']}",
            row["device"],
            row["method"],
            f"{row['time_ms']:.2f}",
            f"{row['speed_over_torch_lloyd']:.2f}x",
            f"{row['error']:.4f}",
        ]
        for row in rows
    ]
    typer.echo(align_table(header, body))
    typer.echo(f"results: {out}", err=True)


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Return the four numbers of `BxNxDxK`.

    Raises:
        ValueError: they are not four positive integers, or K is above N.
    """
    parts = text.strip().split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"shapes: a shape must be BxNxDxK, as in 4x512x128x128, got {text!r}")
    batch, tokens, dim, clusters = (int(part) for part in parts)
    if clusters > tokens:
        raise ValueError(f"shapes: K must be at most N, got {clusters} above {tokens}")
    return batch, tokens, dim, clusters


def devices(name: str) -> list[str]:
    """Return the devices that are meant by `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: the name is another, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: there is no CUDA device that PyTorch can use; pass cpu")
    return ["cpu", "cuda"] if name == "auto" and torch.cuda.is_available() else ["cpu" if name == "auto" else name]


if __name__ == "__main__":
    run_main(main, EXAMPLES)
