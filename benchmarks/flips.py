"""Whose the flips of 16-bit decoding are: the target alone, several tokens a pass, against its own answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from script import ROOT, run_main, with_plain_errors

EXAMPLES = """
Examples:

    python benchmarks/flips.py --target MODEL --data benchmarks/data --per-category 1

    python benchmarks/flips.py --target MODEL --data benchmarks/data --rows 1 --rows 7 --per-category 1
"""


@with_plain_errors
def main(
    target: Annotated[Path, typer.Option(help="Folder of the target, with a drafter of ours.")],
    benchmark: Annotated[str, typer.Option(help="As for spec.py.")] = "spec_bench",
    data: Annotated[Path | None, typer.Option(help="Folder of published prompts.")] = None,
    per_category: Annotated[int, typer.Option(min=1, help="Prompts of each category.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    rows: Annotated[list[int], typer.Option(min=1, help="Tokens of a pass of the target alone; repeatable.")] = [7],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="Record.")] = ROOT / "results" / "flips.json",
) -> None:
    """Count the answers' tokens that the target itself would not have chosen, had it read several tokens in a pass.

    Plain decoding answers greedily. The target alone then reads these answers, so many tokens a pass, without any
    drafter, and names its best token at each position. Last, qm_spec answers with the most drafts in every step.
    """
    from qm_spec.provenance import conditions, write_record

    # Before vLLM is loaded. On a CPU it asks for nearly all memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["QM_SPEC_ADAPT"] = "0"
    from transformers import AutoTokenizer

    from qm_spec import speculative_config
    from qm_spec.bench.workloads.catalogue import load_workload

    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = load_workload(benchmark, tokenizer, data=data, per_category=per_category)
    questions = [list(prompt.token_ids) for prompt in prompts]
    longest = max(map(len, questions)) + tokens + 32

    answers = _answer(questions, tokens, model=str(target), dtype=dtype, max_model_len=longest)
    record: dict[str, Any] = {
        **conditions(),
        "dtype": dtype,
        "prompt_ids": [prompt.prompt_id for prompt in prompts],
        "num_tokens": sum(map(len, answers)),
        "alone": [],
    }
    typer.echo(f"{len(answers)} answers of plain decoding, {record['num_tokens']} tokens")
    for size in rows:
        gaps = _gaps(questions, answers, size, model=str(target), dtype=dtype, max_model_len=longest)
        flips = [gap for some in gaps for gap in some if gap > 0]
        differ = sum(any(gap > 0 for gap in some) for some in gaps)
        record["alone"].append(
            {"tokens_per_pass": size, "num_flips": len(flips), "num_answers": differ, "gaps": sorted(flips)}
        )
        typer.echo(f"the target alone, {size} tokens a pass: {len(flips)} tokens flip, in {differ} answers")
    drafted = _answer(
        questions,
        tokens,
        model=str(target),
        dtype=dtype,
        max_model_len=longest,
        speculative_config=speculative_config(target),
    )
    record["num_answers_with_drafts"] = sum(one != other for one, other in zip(answers, drafted, strict=True))
    typer.echo(f"qm_spec: {record['num_answers_with_drafts']} answers differ from plain decoding's")
    write_record(out, record)
    typer.echo(out)


def _answer(questions: list[list[int]], num_tokens: int, **engine: Any) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(max_num_seqs=1, enable_prefix_caching=False, **engine)
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in questions], sampling)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _gaps(questions: list[list[int]], answers: list[list[int]], size: int, **engine: Any) -> list[list[float]]:
    """Return by how many nats the best token is likelier than the answer's, for each token; 0 where it is the same."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        max_num_seqs=1,
        max_num_batched_tokens=size,
        enable_chunked_prefill=True,
        enable_prefix_caching=False,
        **engine,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    texts = [question + answer for question, answer in zip(questions, answers, strict=True)]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in texts], sampling)
    gaps = []
    for question, answer, output in zip(questions, answers, outputs, strict=True):
        found = output.prompt_logprobs[len(question) :]
        best = [max(one.logprob for one in some.values()) for some in found]
        gaps.append([top - some[token].logprob for top, token, some in zip(best, answer, found, strict=True)])
    return gaps


if __name__ == "__main__":
    run_main(main, EXAMPLES)
