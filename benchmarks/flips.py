"""Whose the flips of 16-bit decoding are: the target alone, several tokens a pass, against its own answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from script import ROOT, run_main, with_plain_errors

# Tokens whose log-probabilities are asked for at each position.
MOST_LIKELY = 5
# Their log-probabilities, by token.
Likely = dict[int, float]

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

    Plain decoding answers greedily, and so does qm_spec, with the most drafts in every step. The target alone, without
    any drafter, then reads plain decoding's answers, so many tokens a pass. It names its best token at each position,
    and how near plain decoding's and qm_spec's tokens are where an answer first goes another way.
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

    engine: dict[str, Any] = {"model": str(target), "dtype": dtype, "max_model_len": longest}
    answers = _answer(questions, tokens, **engine)
    drafted = _answer(questions, tokens, speculative_config=speculative_config(target), **engine)
    first = [_first_difference(one, other) for one, other in zip(answers, drafted, strict=True)]
    record: dict[str, Any] = {
        **conditions(),
        "dtype": dtype,
        "prompt_ids": [prompt.prompt_id for prompt in prompts],
        "num_tokens": sum(map(len, answers)),
        "num_answers_with_drafts": sum(place is not None for place in first),
        "alone": [],
    }
    typer.echo(f"{len(answers)} answers of plain decoding, {record['num_tokens']} tokens")
    typer.echo(f"qm_spec: {record['num_answers_with_drafts']} answers differ from them")
    for size in rows:
        read = _read(questions, answers, size, **engine)
        gaps = [_gap(*each) for each in zip(answers, read, strict=True)]
        flips = [gap for some in gaps for gap in some if gap > 0]
        differ = sum(any(gap > 0 for gap in some) for some in gaps)
        ties = [
            abs(likely[place].get(drafted[number][place], float("-inf")) - likely[place][answers[number][place]])
            for number, (place, likely) in enumerate(zip(first, read, strict=True))
            if place is not None and place < min(len(drafted[number]), len(likely))
        ]
        record["alone"].append(
            {
                "tokens_per_pass": size,
                "num_flips": len(flips),
                "num_answers": differ,
                "gaps": sorted(flips),
                "nats_between_the_tokens_of_first_differences": sorted(ties),
            }
        )
        typer.echo(f"the target alone, {size} tokens a pass: {len(flips)} tokens flip, in {differ} answers")
        if ties:
            typer.echo(f"  where qm_spec's answers first differ the two tokens are at most {max(ties):.3f} nats apart")
    write_record(out, record)
    typer.echo(out)


def _generate(prompts: list[list[int]], sampling: Any, **engine: Any) -> list[Any]:
    """Answer with an engine that is gone afterwards, one request at a time."""
    from vllm import LLM

    llm = LLM(max_num_seqs=1, enable_prefix_caching=False, **engine)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    llm.llm_engine.engine_core.shutdown()
    return outputs


def _answer(questions: list[list[int]], num_tokens: int, **engine: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, detokenize=False)
    return [list(output.outputs[0].token_ids) for output in _generate(questions, sampling, **engine)]


def _read(
    questions: list[list[int]], answers: list[list[int]], size: int, **engine: Any
) -> list[list[dict[int, float]]]:
    """Return for each token of the answers the log-probabilities of it and of the likeliest, by the target alone."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=MOST_LIKELY, detokenize=False)
    texts = [question + answer for question, answer in zip(questions, answers, strict=True)]
    outputs = _generate(texts, sampling, max_num_batched_tokens=size, enable_chunked_prefill=True, **engine)
    return [
        [{token: one.logprob for token, one in some.items()} for some in output.prompt_logprobs[len(question) :]]
        for question, output in zip(questions, outputs, strict=True)
    ]


def _gap(answer: list[int], read: list[Likely]) -> list[float]:
    """Return by how many nats the best token is likelier than the answer's, for each token; 0 where it is the same."""
    return [max(likely.values()) - likely[token] for token, likely in zip(answer, read, strict=True)]


def _first_difference(one: list[int], other: list[int]) -> int | None:
    """Return the first place where two answers differ, None where one is the other."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


if __name__ == "__main__":
    run_main(main, EXAMPLES)
