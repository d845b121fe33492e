"""What a simulation is asked for; each field is an option of `qm-spec simulate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What is predicted. Lists stand as they are typed."""

    target_config: Annotated[Path, Option(metavar="FILE|DIR", help="config.json of the target, or its folder.")]
    hardware: Annotated[
        str, Option(metavar="NAME|FILE", help="h100, h200, cpu, or a file as measure-hardware writes it.")
    ] = "h100"
    acceptance: Annotated[
        str | None,
        Option(metavar="FILE|P,...", help="results.json of a benchmark, or shares kept per position: 0.8,0.6,0.5"),
    ] = None
    method: Annotated[
        str, Option(help="Whose runs of the results are taken; ngram needs no drafter, eagle3 attends to all.")
    ] = "qm_spec"
    drafter: Annotated[
        Path | None,
        Option(metavar="FILE|DIR", help="config.json of the drafter.", show_default="one of the target's sizes"),
    ] = None
    batch: Annotated[str, Option(metavar="B,...", help="Requests in a step.")] = "1,8,32,128"
    context: Annotated[str, Option(metavar="L,...", help="Tokens of context; 128k and 1M work.")] = "1k,8k,128k"
    num_speculative_tokens: Annotated[
        str | None, Option(metavar="K,...", help="As 1..4 or 2,4.", show_default="all of known acceptance")
    ] = None
    dtype: Annotated[str, Option(help="bfloat16, float16, float32 or float8; keys and values take 2 bytes or 4.")] = (
        "bfloat16"
    )
    tensor_parallel: Annotated[int, Option(help="Devices of one replica.")] = 1
    max_num_seqs: Annotated[int, Option(help="Most requests in a step of a replica.")] = 256
    arrival_rate: Annotated[
        float | None, Option(help="Requests per second over all replicas: simulates traffic, too.")
    ] = None
    replicas: Annotated[int, Option(help="Of the traffic.")] = 1
    num_requests: Annotated[
        int | None, Option(help="That arrive in all.", show_default="200 per replica, 2000 at least")
    ] = None
    output_tokens: Annotated[int, Option(help="Mean length of an output.")] = 256
    ttft_limit_ms: Annotated[float | None, Option(help="Later first tokens are no goodput.")] = None
    tpot_limit_ms: Annotated[float | None, Option(help="Slower further tokens are no goodput.")] = None
    seed: Annotated[int, Option(help="Of the traffic.")] = 0
