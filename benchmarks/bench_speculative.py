"""Speculative against standard generation with transformers models, without vLLM: speed, acceptance, same output."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from script import NOVELS, run_main, with_plain_errors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qm_spec.decoding.speculation import SpeculativeDecoder

# The seed README's call, on models of random weights.
README_SIZES: dict[str, Any] = {"vocab_size": 1000, "dim": 128, "quickmerge_dim": 64, "k_max": 32, "max_draft_len": 4}
README_TEMPERATURE = 0.8
README_STATES = 100

EXAMPLES = """
Examples:

    python benchmarks/bench_speculative.py

    python benchmarks/bench_speculative.py --num-prompts 8 --max-tokens 128 --context 512 --repeats 5

    python benchmarks/bench_speculative.py --target MODEL --draft DRAFT_DIR --prompts questions.jsonl --temperature 0.7
"""


@with_plain_errors
def main(
    target: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the target model.", show_default="the shipped pair's")
    ] = NOVELS / "target",
    draft: Annotated[
        str, typer.Option(metavar="DIR|qm_spec", help="Drafter folder, or qm_spec to find the target's own.")
    ] = "qm_spec",
    num_speculative_tokens: Annotated[
        int | None, typer.Option(metavar="K", help="Drafted tokens per step.", show_default="the drafter's, or 4")
    ] = None,
    prompts: Annotated[
        str, typer.Option(metavar="builtin|FILE.jsonl", help="Rows with 'text', 'prompt' or OpenAI 'messages'.")
    ] = "builtin",
    num_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="The first N of them.")] = 4,
    context: Annotated[int, typer.Option(metavar="L", min=1, help="Each is cut to its first L tokens.")] = 128,
    max_tokens: Annotated[int, typer.Option(metavar="M", min=2, help="Output tokens per prompt.")] = 64,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0 decodes greedily.")] = 0.0,
    repeats: Annotated[
        int, typer.Option(metavar="R", min=1, help="Measured passes; the median of each prompt counts.")
    ] = 2,
    seed: Annotated[int, typer.Option(metavar="S", help="Of sampling.")] = 0,
    threads: Annotated[
        int, typer.Option(metavar="T", min=1, help="Of torch; the shipped pair is too small to gain by more.")
    ] = 1,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results.")] = Path("results/bench_speculative.json"),
) -> None:
    """Compare speculative decoding with standard generation by transformers, one request at a time.

    Methods: transformers' own generate(), its assisted generation by prompt lookup, and qm_spec's decoder.
    Then the seed README's example: a module of random weights without a cache, and an untrained drafter. All
    methods take turns at each prompt. The table goes to stdout, times and provenance to FILE.
    """
    import torch

    torch.set_num_threads(threads)
    from qm_spec.provenance import write_record

    results = run(
        target, draft, num_speculative_tokens, prompts, num_prompts, context, max_tokens, temperature, repeats, seed
    )
    write_record(out, results)
    print_table(results["runs"])
    typer.echo(f"results: {out}", err=True)


@dataclass
class Method:
    """One way to decode, and what it needed for each prompt.

    Attributes:
        name: in the table.
        decode: `[1, T]` prompt to `[1, T + n]` tokens, and the decoder's statistics where it has some.
    """

    name: str
    decode: Callable[[Tensor], tuple[Tensor, dict[str, Any] | None]]
    seconds: list[list[float]] = field(default_factory=list)
    new_ids: list[list[int]] = field(default_factory=list)
    passes: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0

    def measure(self, prompt: Tensor, target: nn.Module) -> None:
        """Decode once more; counts and tokens are of the last time."""
        passes = 0

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        hook = target.register_forward_hook(count)
        try:
            begin = time.perf_counter()
            ids, stats = self.decode(prompt)
            elapsed = time.perf_counter() - begin
        finally:
            hook.remove()
        self.seconds[-1].append(elapsed)
        if len(self.seconds[-1]) > 1:
            return
        self.new_ids.append(ids[0, prompt.shape[1] :].tolist())
        self.passes += passes
        if stats is not None:
            self.drafts += stats["drafts"]
            self.drafted += stats["drafted_tokens"]
            self.accepted += stats["accepted_tokens"]


def measure(
    label: str, methods: Sequence[Method], prompts: Sequence[Tensor], target: nn.Module, repeats: int, greedy: bool
) -> list[dict[str, Any]]:
    """Return one row of results per method; the first method is the reference."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=len(prompts) * repeats * len(methods))
        for method in methods:
            # The first calls of a process meet new shapes.
            method.decode(prompts[0][:, :8])
        for prompt in prompts:
            for method in methods:
                method.seconds.append([])
            for _ in range(repeats):
                for method in methods:
                    method.measure(prompt, target)
                    progress.advance(bar)
    rows = []
    reference = methods[0]
    for method in methods:
        seconds = sum(statistics.median(times) for times in method.seconds)
        reference_s = sum(statistics.median(times) for times in reference.seconds)
        tokens = sum(map(len, method.new_ids))
        tokens_per_s = tokens / seconds
        reference_tokens_per_s = sum(map(len, reference.new_ids)) / reference_s
        rows.append(
            {
                "target": label,
                "method": method.name,
                "output_tokens": tokens,
                "seconds": seconds,
                "seconds_each": method.seconds,
                "tokens_per_s": tokens_per_s,
                "speedup": tokens_per_s / reference_tokens_per_s,
                "tokens_per_pass": tokens / method.passes,
                "acceptance_length": 1 + method.accepted / method.drafts if method.drafts else None,
                "acceptance_rate": method.accepted / method.drafted if method.drafted else None,
                "identical": method.new_ids == reference.new_ids if greedy and method is not reference else None,
            }
        )
    return rows


def run(
    target: Path,
    draft: str,
    depth: int | None,
    prompts_source: str,
    num_prompts: int,
    context: int,
    max_tokens: int,
    temperature: float,
    repeats: int,
    seed: int,
) -> dict[str, Any]:
    """Measure both targets, and return the rows with their provenance."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qm_spec import create_speculative_decoder, provenance
    from qm_spec.bench.environment import describe_environment
    from qm_spec.bench.workloads.prompts import prompts_file, read_prompts, sha256_of, tokenize_prompts
    from qm_spec.discovery import target_fingerprint

    file = prompts_file(prompts_source)
    commit = provenance.git_commit()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    drafter = None if draft == "qm_spec" else draft
    decoder = create_speculative_decoder(model, drafter=drafter, max_draft_len=depth, temperature=temperature)
    texts = tokenize_prompts(read_prompts(file, num_prompts), AutoTokenizer.from_pretrained(target))
    ids = [torch.tensor([text.token_ids[:context]], device=model.device) for text in texts]
    methods = transformers_methods(model, decoder, max_tokens, seed)
    rows = measure("transformers", methods, ids, model, repeats, temperature == 0)
    bare, bare_methods, bare_prompts = readme_example(max_tokens, seed, num_prompts)
    rows += measure("bare module", bare_methods, bare_prompts, bare, repeats, greedy=False)
    return {
        "runs": rows,
        "settings": {
            "target": target.name,
            "target_fingerprint": target_fingerprint(target),
            "num_speculative_tokens": decoder.max_draft_len,
            "prompts": file.name,
            "prompts_sha256": sha256_of(file),
            "num_prompts": num_prompts,
            "context_tokens": [prompt.shape[1] for prompt in ids],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "repeats": repeats,
            "seed": seed,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "bare_module": {**README_SIZES, "temperature": README_TEMPERATURE, "encoder_states": README_STATES},
        },
        "provenance": {"command": provenance.command(), "commit": commit, **describe_environment()},
    }


def transformers_methods(
    model: PreTrainedModel, decoder: SpeculativeDecoder, max_tokens: int, seed: int
) -> list[Method]:
    """Return standard generation, prompt lookup and the decoder, all to exactly `max_tokens` tokens."""
    import torch

    temperature = decoder.temperature
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    # No EOS, so that every method writes the same number of tokens.
    length = {"max_new_tokens": max_tokens, "eos_token_id": None, "pad_token_id": 0}

    def generate(**options: Any) -> Callable[[Tensor], tuple[Tensor, None]]:
        def decode(prompt: Tensor) -> tuple[Tensor, None]:
            torch.manual_seed(seed)
            mask = torch.ones_like(prompt)
            return model.generate(prompt, attention_mask=mask, **length, **sampling, **options), None

        return decode

    def speculate(prompt: Tensor) -> tuple[Tensor, Any]:
        return decoder.generate(prompt, max_new_tokens=max_tokens, eos_token_id=(), seed=seed, measure_speedup=False)

    return [
        Method("standard", generate()),
        Method("prompt lookup", generate(prompt_lookup_num_tokens=decoder.max_draft_len)),
        Method("qm_spec", speculate),
    ]


def readme_example(max_tokens: int, seed: int, num_prompts: int) -> tuple[nn.Module, list[Method], list[Tensor]]:
    """Return the seed README's example: a random module, standard and speculative decoding, random prompts."""
    import torch
    from torch import nn

    from qm_spec import create_speculative_decoder

    vocab_size, dim = README_SIZES["vocab_size"], README_SIZES["dim"]

    class Target(nn.Module):
        """Two causal layers that also read encoder states."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocab_size, dim)
            layer = nn.TransformerDecoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True)
            self.layers = nn.TransformerDecoder(layer, 2)
            self.head = nn.Linear(dim, vocab_size)

        def forward(self, token_ids: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(token_ids.shape[1])
            states = self.layers(self.embed(token_ids), encoder_hidden_states, tgt_mask=mask, tgt_is_causal=True)
            return self.head(states)

    torch.manual_seed(seed)
    target = Target().eval()
    states = torch.randn(1, README_STATES, dim)
    prompts = [torch.randint(vocab_size, (1, 32)) for _ in range(num_prompts)]
    with warnings.catch_warnings():
        # The table says that it is untrained.
        warnings.simplefilter("ignore", UserWarning)
        decoder = create_speculative_decoder(target, **README_SIZES, temperature=README_TEMPERATURE, seed=seed)

    @torch.no_grad()
    def standard(prompt: Tensor) -> tuple[Tensor, None]:
        generator = torch.Generator().manual_seed(seed)
        ids = prompt
        for _ in range(max_tokens):
            probs = torch.softmax(target(ids, states)[:, -1] / README_TEMPERATURE, -1)
            ids = torch.cat([ids, torch.multinomial(probs, 1, generator=generator)], 1)
        return ids, None

    def speculate(prompt: Tensor) -> tuple[Tensor, Any]:
        return decoder.generate(prompt, states, max_tokens, seed=seed, measure_speedup=False)

    return target, [Method("standard", standard), Method("qm_spec, untrained", speculate)], prompts


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print one row per method, in Markdown that is also aligned in a terminal; "-" for what is not known."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    columns = ("target", "method", "tokens/s", "speedup", "accept length", "accept rate", "tokens/pass", "identical")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        identical = {None: "-", True: "yes", False: "no"}[row["identical"]]
        table.add_row(
            row["target"],
            row["method"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['speedup']:.2f}",
            _number(row["acceptance_length"]),
            _number(row["acceptance_rate"]),
            f"{row['tokens_per_pass']:.2f}",
            identical,
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    run_main(main, EXAMPLES)
