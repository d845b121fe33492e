"""`results.json`: what was measured, where, and with what.

The file holds `schema_version`, `environment`, `command`, `provenance`, `runs` (one record per method and setting,
see `qm_spec.bench.results.records`) and `failures` (`{"method", "error"}`, with `"prompt_id"` where a single request
failed, or `"prompt_ids"` where all of a shard's did). From version 2 on, every run lists its requests under
`requests`, see `RequestRow`. What failed is in no number of a run. From version 3 on, speed-ups are ratios within
turns, see `qm_spec.bench.results.turns`. After a sweep there is a `recommendation`, see
`qm_spec.bench.report.recommend`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qm_spec.provenance import write_record

SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
FILE_NAME = "results.json"


@dataclass(frozen=True)
class RequestRow:
    """One finished request, of its median pass, as `run["requests"]` lists it in the order of the prompts.

    Args:
        prompt_id: the same in every run of the prompt, so that runs can be compared pair by pair.
        category: task that the prompt belongs to; None where the prompts have none.
        context_tokens: tokens of the prompt.
        output_tokens: tokens put out.
        num_steps: engine steps that yielded some of them.
        num_drafts: proposals verified; 0 without speculation.
        num_draft_tokens: tokens in those proposals.
        num_accepted_tokens: drafted tokens that the target kept, without its own bonus tokens.
        accepted_per_position: the kept ones by position in the proposal, first position first.
        ttft_s: seconds from handing in the request to its first token.
        tpot_s: seconds per further token; None for a single token.
        latency_s: seconds from handing in the request to its last token.
        arrival_s: when the request was handed in, in seconds of its turn; None where it was not recorded.
        speedup: its speed by that of plain decoding in the same turn, median over the passes; None where there is none.
    """

    prompt_id: str
    category: str | None
    context_tokens: int
    output_tokens: int
    num_steps: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: tuple[int, ...]
    ttft_s: float
    tpot_s: float | None
    latency_s: float
    arrival_s: float | None = None
    speedup: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict; `from_json` reads it back."""
        return {**asdict(self), "accepted_per_position": list(self.accepted_per_position)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> RequestRow:
        """Return the row that `to_json` wrote.

        Raises:
            ValueError: a field is missing or unknown; the message names it.
        """
        known = {field.name for field in fields(cls)}
        missing = sorted(known - set(row) - {"arrival_s", "speedup"})
        unknown = sorted(set(row) - known)
        if missing or unknown:
            raise ValueError(f"requests: a row must have the fields of RequestRow, lacks {missing}, has {unknown}")
        return cls(**{**row, "accepted_per_position": tuple(row["accepted_per_position"])})


def request_rows(run: dict[str, Any]) -> list[RequestRow]:
    """Return the requests of a run, none where its file is older than the list of requests."""
    return [RequestRow.from_json(row) for row in run.get("requests", ())]


def read_results(path: Path) -> dict[str, Any]:
    """Read `path`, which is a results file or a folder with a `results.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a results file, or of a version that this code does not know.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"results: {file} does not exist; pass the folder that qm-spec eval or benchmarks/spec.py wrote"
        )
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"results: {file} must be JSON ({error})") from error
    if not isinstance(results, dict) or not isinstance(results.get("runs"), list):
        raise ValueError(f"results: {file} must be an object with a list of runs; pass a results.json of a benchmark")
    if results.get("schema_version") not in READABLE_VERSIONS:
        raise ValueError(
            f"results: {file} must have schema_version one of {', '.join(map(str, READABLE_VERSIONS))}, got "
            f"{results.get('schema_version')}; read it with the version of qm_spec that wrote it"
        )
    return results


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """Write `folder/results.json` so that a reader sees the whole old file or the whole new one."""
    write_record(folder / FILE_NAME, results)
    return folder / FILE_NAME
