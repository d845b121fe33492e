"""Acceptance over the length of the context: our drafter beside EAGLE-3, with and without suffix lookup."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from script import NOVELS, run_main, split_list, with_plain_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qm_spec.bench.acceptance.by_length import AcceptanceSettings, LongContextRow
    from qm_spec.bench.results.bootstrap import Estimate
    from qm_spec.drafter.anchors import Drafter

DOMAINS = "novels,quotations,records,code"

# Tokens that drafters are trained at: acceptance at other lengths is compared with that here.
BASE_LENGTH = 1024

EXAMPLES = """
Examples:

    python benchmarks/long_context.py --lengths 256,512,1024 --out results/long_context

    python benchmarks/long_context.py --target T --drafter ours=D --drafter eagle3=E --text BOOKS

    python benchmarks/long_context.py --target T --drafter ours=D --text BOOKS --merge "window-only=schedule:0"

    python benchmarks/long_context.py --target T --drafter qm_spec=D --text BOOKS --speed novels --out results/speed
"""


@with_plain_errors
def main(
    target: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the target model.", show_default="the shipped pair's")
    ] = NOVELS / "target",
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A drafter of it; may be repeated. NAME-1, NAME-2... are its other seeds.",
            show_default="qm_spec=the target's own",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Prose that nothing was trained on.", show_default="the shipped prompts"),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=KEY:VALUE",
            help="The first drafter, each seed of it, with another setting of its memory, e.g. window-only=schedule:0.",
        ),
    ] = None,
    domains: Annotated[str, typer.Option(metavar="D,...", help=f"Of {DOMAINS}.")] = DOMAINS,
    lengths: Annotated[str, typer.Option(metavar="L,...", help="Tokens of the prompts.")] = "256,512,1024,2048",
    num_prompts: Annotated[int, typer.Option(metavar="N", help="Of each domain and length.")] = 12,
    num_tokens: Annotated[int, typer.Option(metavar="M", help="Tokens written behind each.")] = 64,
    num_speculative_tokens: Annotated[
        int, typer.Option(metavar="K", help="Drafted tokens per step; --speed leaves it to methods.")
    ] = 4,
    num_looked_up: Annotated[
        int | None,
        typer.Option(
            metavar="L", help="Most tokens per step that lookup drafts; in vLLM on a CPU 16.", show_default="K"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", help="Of the target; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Of prompts and sampling.")] = 0,
    threads: Annotated[int, typer.Option(metavar="T", help="Of torch.")] = 1,
    draw: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="What the plot shows, e.g. ours,lookup,ours+lookup; all but the other drafters' hybrids if not given.",
        ),
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(metavar="D,...", help="Measure speed in vLLM instead, on the prompts of these domains together."),
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Passes of --speed, each with new engines.")] = 3,
    ngram: Annotated[bool, typer.Option(help="Measure the speed of n-gram lookup, too.")] = True,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("results/long_context"),
) -> None:
    """Measure acceptance over the length of the context by replaying drafters on what the target writes.

    Writes long_context.json, .md and .png; after each length, so that an interruption loses nothing. With
    --speed it measures as qm-spec eval does, and writes what that writes: plain decoding, n-gram lookup of 4 and of 16
    tokens and the drafters, each with its own number of tokens, on prompts of these domains.
    """
    from qm_spec.bench.acceptance.by_length import AcceptanceSettings
    from qm_spec.discovery import find_drafter

    named = drafter or [f"qm_spec={find_drafter(str(target))}"]
    text = text or [NOVELS / "prompts.jsonl"]
    settings = AcceptanceSettings(
        [int(length) for length in split_list(lengths)],
        num_prompts,
        num_tokens,
        num_speculative_tokens,
        num_looked_up or num_speculative_tokens,
        split_list(domains if speed is None else speed),
        temperature,
        seed,
    )
    if speed is not None:
        others = {"--merge": merge, "--num-looked-up": num_looked_up, "--temperature": temperature, "--draw": draw}
        if given := [option for option, value in others.items() if value]:
            raise ValueError(f"--speed decodes greedily with the drafters as they are, without {', '.join(given)}")
        raise typer.Exit(time_methods(target, _folders(named), text, settings, ngram, repeats, out))
    drawn = None if draw is None else split_list(draw)
    measure(target, named, text, merge or [], settings, threads, drawn, out)


def measure(
    target_dir: Path,
    named: Sequence[str],
    text: Sequence[Path],
    merges: Sequence[str],
    settings: AcceptanceSettings,
    threads: int,
    drawn: Sequence[str] | None,
    out: Path,
) -> None:
    """Measure all rows and keep the files in `out` up to date."""
    import torch
    from rich.progress import Progress
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qm_spec import provenance
    from qm_spec.bench.acceptance.by_length import measure_acceptance
    from qm_spec.training.data import find_files, sha256_of

    torch.set_num_threads(threads)
    record: dict[str, Any] = {
        **provenance.conditions(),
        "text_sha256": sha256_of(find_files(text)),
        "seed": settings.seed,
        "num_speculative_tokens": settings.num_drafts,
        "num_looked_up": settings.num_looked_up,
        "temperature": settings.temperature,
        "tokens_per_prompt": settings.num_tokens,
        "rows": [],
    }
    drafters = load_drafters(named, merges, target_dir)
    drawn = chosen_to_draw(list(dict.fromkeys(without_seed(name) for name in drafters)), drawn)
    record["entries_attended"] = {name: _entries(drafter, settings.lengths) for name, drafter in drafters.items()}
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[LongContextRow] = []
    with Progress() as progress:
        task = progress.add_task("replay", total=len(settings.domains) * len(settings.lengths) * settings.num_prompts)

        def on_progress(domain: str, length: int) -> None:
            progress.update(task, advance=1, description=f"{domain} {length}")

        for some in measure_acceptance(target, tokenizer, drafters, text, settings, on_progress):
            rows.extend(some)
            record["rows"] = [dataclasses.asdict(row) for row in rows]
            provenance.write_record(out / "long_context.json", record)
    (out / "long_context.md").write_text(table(rows))
    plot([row for row in pool_seeds(rows) if row.drafter in drawn], out / "long_context.png")
    print(table(rows))


def time_methods(
    target: Path,
    drafters: dict[str, Path],
    text: Sequence[Path],
    asked: AcceptanceSettings,
    ngram: bool,
    repeats: int,
    out: Path,
) -> int:
    """Measure speed in vLLM as `qm-spec eval` does, on prompts of all domains; return its exit code."""
    from transformers import AutoTokenizer

    from qm_spec.bench.acceptance.by_length import PromptWriter
    from qm_spec.bench.engine.shards import TokenPrompt
    from qm_spec.bench.methods import METHODS, OURS, REFERENCE_METHOD
    from qm_spec.bench.runs.benchmark import Benchmark
    from qm_spec.bench.settings import BenchmarkSettings
    from qm_spec.cli.evaluate import run_with_progress

    # The shipped drafter has the name of a method that finds it by the target.
    own = {name: folder for name, folder in drafters.items() if name in METHODS and METHODS[name].drafter == OURS}
    if len(own) > 1:
        raise ValueError(f"--speed: give all drafters but one names of their own, got {', '.join(own)}")
    settings = BenchmarkSettings(
        target=target,
        out=out,
        draft=str(next(iter(own.values()), "")),
        methods=(REFERENCE_METHOD, *(("ngram", "ngram-16") if ngram else ()), *own),
        baselines={name: folder for name, folder in drafters.items() if name not in own},
        prompts=",".join(asked.domains),
        max_tokens=asked.num_tokens,
        context_lengths=tuple(asked.lengths),
        seed=asked.seed,
        repeats=repeats,
    )
    writer = PromptWriter(AutoTokenizer.from_pretrained(target), text, max(asked.lengths))
    prompts = [
        tuple(
            TokenPrompt(f"{domain}-{number}", tuple(writer.write(domain, length, asked.seed + number)), domain)
            for number in range(asked.num_prompts)
            for domain in asked.domains
        )
        for length in asked.lengths
    ]
    return run_with_progress(Benchmark(settings, prompts))


def load_drafters(named: Sequence[str], merges: Sequence[str], target_dir: Path) -> dict[str, Drafter]:
    """Return the drafters by name, and the first one's seeds again with each other setting of their memory.

    Raises:
        ValueError: an option is malformed, a setting unknown, or a drafter is another target's.
    """
    from qm_spec.config import MergeConfig
    from qm_spec.discovery import target_fingerprint
    from qm_spec.drafter.checkpoint import load_drafter
    from qm_spec.drafter.prior import QuickMergePrior

    fingerprint = target_fingerprint(target_dir)
    folders = _folders(named)
    drafters: dict[str, Drafter] = {}
    for name, folder in folders.items():
        drafter = load_drafter(folder).eval()
        if drafter.config.target_fingerprint != fingerprint:
            raise ValueError(
                f"--drafter: {folder} was trained for the target {drafter.config.target_fingerprint}, "
                f"and {target_dir} is {fingerprint}"
            )
        drafters[name] = drafter
    first = next(iter(folders))
    seeds = {name: folder for name, folder in folders.items() if without_seed(name) == first}
    for option in merges:
        changed, setting = _split(option, "=", "--merge NAME=KEY:VALUE")
        key, value = _split(setting, ":", "--merge NAME=KEY:VALUE")
        for name, folder in seeds.items():
            again = load_drafter(folder).eval()
            if not isinstance(again, QuickMergePrior):
                raise ValueError(f"--merge: {folder} is no QuickMerge drafter; name one first")
            known = again.config.merge.to_dict()
            given: Any = value
            if key == "schedule":
                given = [int(count) for count in value.split("-")]
            elif isinstance(known.get(key), (int, float)):
                given = type(known[key])(value)
            again.config.merge = MergeConfig.from_dict({**known, key: given})
            drafters[changed + name.removeprefix(first)] = again
    return drafters


def chosen_to_draw(drafters: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Return the rows that the plot shows: the wanted ones, or all but the hybrids of the second drafter on.

    Raises:
        ValueError: a wanted one is not measured.
    """
    from qm_spec.bench.acceptance.by_length import LOOKUP

    hybrids = [f"{name}+{LOOKUP}" for name in drafters]
    if wanted is None:
        return [*drafters, LOOKUP, hybrids[0]]
    known = [*drafters, LOOKUP, *hybrids]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--draw: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return list(wanted)


def _folders(named: Sequence[str]) -> dict[str, Path]:
    return {name: Path(folder) for name, folder in (_split(option, "=", "--drafter NAME=DIR") for option in named)}


def _split(option: str, sign: str, form: str) -> tuple[str, str]:
    left, found, right = option.partition(sign)
    if not (left and found and right):
        raise ValueError(f"{form}: got {option!r}")
    return left, right


def _entries(drafter: Drafter, lengths: Sequence[int]) -> list[int]:
    """Keys that one key/value head attends to after each length."""
    config = drafter.config
    if hasattr(config, "merge"):
        return [config.merge.entries_attended(length) for length in lengths]
    if config.sliding_window is None:
        return list(lengths)
    return [min(length, config.sliding_window + config.attention_sinks) for length in lengths]


def table(rows: Sequence[LongContextRow]) -> str:
    """Return one Markdown table per domain: drafters down, their seeds pooled, lengths across."""
    from qm_spec.bench.results.table import align_table

    rows, parts = pool_seeds(rows), []
    for domain in dict.fromkeys(row.domain for row in rows):
        mine = [row for row in rows if row.domain == domain]
        lengths = sorted({row.context for row in mine})
        copied = {row.context: row.copied for row in mine}
        found = {(row.drafter, row.context): row.acceptance_length for row in mine}
        names = dict.fromkeys(row.drafter for row in mine)
        body = [[name, *(_cell(found[name, length]) for length in lengths)] for name in names]
        if domain == "quotations":
            body.append(["*the target goes on quoting*", *(f"{copied[length]:.0%}" for length in lengths)])
        parts.append(f"### {domain}\n\n{align_table(['drafter', *map(str, lengths)], body)}\n")
        parts.append(align_table(["times as long", *map(str, lengths)], _ratios(mine, lengths)) + "\n")
    return "\n".join(parts) + "\n"


def _cell(estimate: Estimate) -> str:
    spread = f" ({estimate.low:.2f}-{estimate.high:.2f})" if estimate.has_interval else ""
    return f"{estimate.value:.2f}{spread}"


def without_seed(name: str) -> str:
    """Return `NAME` for `NAME-1`, `NAME-2`..., which are other seeds of it, hybrids included."""
    return re.sub(r"-\d+(?=\+|$)", "", name)


def pool_seeds(rows: Sequence[LongContextRow]) -> list[LongContextRow]:
    """Add tokens and steps of a drafter's seeds."""
    from qm_spec.bench.acceptance.by_length import acceptance_length

    pooled: dict[tuple[str, int, str], LongContextRow] = {}
    for row in rows:
        name = without_seed(row.drafter)
        key = (row.domain, row.context, name)
        if key in pooled:
            tokens, steps = (
                tuple(a + b for a, b in zip(getattr(pooled[key], what), getattr(row, what), strict=True))
                for what in ("tokens", "steps")
            )
            estimate = acceptance_length(tokens, steps)
            pooled[key] = dataclasses.replace(pooled[key], acceptance_length=estimate, tokens=tokens, steps=steps)
        else:
            pooled[key] = dataclasses.replace(row, drafter=name)
    return list(pooled.values())


def _ratios(rows: Sequence[LongContextRow], lengths: Sequence[int]) -> list[list[str]]:
    """Return the lines of the first drafter, and of its hybrid, over the others and over itself at `BASE_LENGTH`."""
    found = {(row.drafter, row.context): row for row in rows}
    names = list(dict.fromkeys(row.drafter for row in rows))
    first = names[0]
    hybrid = next(name for name in names if name.startswith(f"{first}+"))
    lines = []
    base = BASE_LENGTH if BASE_LENGTH in lengths else lengths[0]
    for name in (first, hybrid):
        for other in names:
            if other != name and (name == hybrid or "+" not in other):
                ratios = [found[name, length].over(found[other, length]) for length in lengths]
                lines.append([f"{name} / {other}", *map(_cell, ratios)])
    for name in (first, hybrid):
        lines.append([f"{name} / at {base}", *(_cell(found[name, n].over(found[name, base])) for n in lengths)])
    return lines


def plot(rows: Sequence[LongContextRow], file: Path) -> None:
    """Draw acceptance length over context, one panel per domain; hybrids are dashed."""
    from matplotlib.figure import Figure

    domains = list(dict.fromkeys(row.domain for row in rows))
    figure = Figure(figsize=(4.2 * len(domains) + 1, 4), layout="constrained")
    panels = figure.subplots(1, len(domains), squeeze=False, sharey=True)[0]
    colours = ("#0072B2", "#D55E00", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#999999", "#000000")
    names = list(dict.fromkeys(row.drafter for row in rows))
    for axes, domain in zip(panels, domains, strict=True):
        for number, name in enumerate(names):
            mine = sorted(
                (row for row in rows if (row.domain, row.drafter) == (domain, name)), key=lambda row: row.context
            )
            x = [row.context for row in mine]
            axes.plot(
                x,
                [row.acceptance_length.value for row in mine],
                marker="o",
                color=colours[number % 8],
                label=name,
                linestyle="--" if "+" in name else "-",
            )
            if all(row.acceptance_length.has_interval for row in mine):
                axes.fill_between(
                    x,
                    [row.acceptance_length.low or 0 for row in mine],
                    [row.acceptance_length.high or 0 for row in mine],
                    color=colours[number % 8],
                    alpha=0.07,
                    linewidth=0,
                )
        axes.set(xscale="log", xlabel="context in tokens", title=domain)
        axes.set_xticks(x, [str(length) for length in x])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set(ylabel="acceptance length", ylim=(1, None))
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    run_main(main, EXAMPLES)
