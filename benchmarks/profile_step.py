"""Where one decode step goes: target, sampling, drafting and the rest, in milliseconds."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
NOVELS = ROOT / "qm_spec" / "zoo" / "novels"

SESSION = "qm_spec.integrations.vllm_plugin.session"

# What is timed: label, module, attribute path. A label that begins with a space lies within the one above.
TIMED = (
    ("target forward", "vllm.v1.worker.gpu_model_runner", "GPUModelRunner._model_forward"),
    ("vocabulary head", "vllm.model_executor.layers.logits_processor", "LogitsProcessor.forward"),
    ("sampling and verification", "vllm.v1.worker.gpu_model_runner", "GPUModelRunner._sample"),
    ("drafting", SESSION, "DraftSession.draft"),
    (" reading new tokens, by the operator", SESSION, "append_states_"),
    (" fusing the target's states", "qm_spec.drafter.layer", "PriorLayer.fuse"),
    (" keys and values of new tokens", "qm_spec.drafter.loops.gathered", "DraftLoop.remember"),
    (" merging", SESSION, "merge_groups_"),
    (" all draft steps", SESSION, "draft_tokens"),
)


def timed(owner: Any, name: str, label: str, spent: dict[str, float], clock: Callable[[], float]) -> None:
    """Replace `owner.name` by itself with its seconds added to `spent[label]`."""
    original: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        begin = clock()
        try:
            return original(*args, **kwargs)
        finally:
            spent[label] += clock() - begin

    setattr(owner, name, measured)


def main(
    target: Annotated[Path, typer.Option(help="Folder of the target.")] = NOVELS / "target",
    method: Annotated[str, typer.Option(help="none, qm_spec or qm_spec-reference.")] = "qm_spec",
    dtype: Annotated[str, typer.Option(help="Of the target: float32 or bfloat16.")] = "float32",
    context: Annotated[int, typer.Option(help="Prompt tokens.")] = 256,
    steps: Annotated[int, typer.Option(help="Measured decode steps.")] = 100,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="CPU time of one thread, which other load on the machine disturbs less.")
    ] = False,
) -> None:
    """Print the median milliseconds of the parts of a decode step of one request on the CPU.

    Example: python benchmarks/profile_step.py --method none
    """
    from qm_spec.bench.methods import find_method

    # The engine's libraries are loaded with the process, so it starts once more with their environment.
    if os.environ.get("QM_SPEC_PROFILE") != "1":
        environment = {
            "VLLM_LOGGING_LEVEL": "ERROR",
            **find_method(method).engine_environment("cpu"),
            "QM_SPEC_PROFILE": "1",
        }
        if cpu_time:
            environment["OMP_NUM_THREADS"] = "1"
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)

    from importlib import import_module

    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    import qm_spec

    config = None if method == "none" else qm_spec.speculative_config(target)
    llm = LLM(str(target), dtype=dtype, max_model_len=context + 1024, speculative_config=config)
    clock = time.thread_time if cpu_time else time.perf_counter
    spent: dict[str, float] = defaultdict(float)
    for label, module, path in TIMED:
        *owners, name = path.split(".")
        owner = import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        timed(owner, name, label, spent, clock)

    text = json.loads((NOVELS / "prompts.jsonl").read_text().splitlines()[0])["text"]
    ids = AutoTokenizer.from_pretrained(target)(text)["input_ids"][:context]
    sampling = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("profile", {"prompt_token_ids": ids}, sampling)
    parts: dict[str, list[float]] = defaultdict(list)
    # The first steps meet new shapes; they are not counted.
    for step in range(steps + 20):
        spent.clear()
        begin = clock()
        llm.llm_engine.step()
        whole = clock() - begin
        if step < 20:
            continue
        for label, *_ in TIMED:
            parts[label].append(1000 * spent[label])
        known = sum(spent[label] for label, *_ in TIMED if not label.startswith(" "))
        parts["scheduling, inputs, outputs"].append(1000 * (whole - known))
        parts["whole step"].append(1000 * whole)
    kind = "CPU time of one thread" if cpu_time else "wall time"
    typer.echo(f"{method}, {context} tokens of context, median of {steps} steps, {kind}, ms:")
    for label, values in parts.items():
        typer.echo(f"  {label:38}{statistics.median(values):8.2f}")


if __name__ == "__main__":
    typer.run(main)
