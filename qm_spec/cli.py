"""`qm-spec`: train a drafter for a target, a compressor of its states, or a small target to try things on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from qm_spec.cli_fetch import FETCH_EXAMPLES, fetch
from qm_spec.evaluation.answering_command import EXAMPLES as DATA_EXAMPLES
from qm_spec.evaluation.answering_command import answer
from qm_spec.evaluation.command import EXIT_INTERRUPTED, evaluate, ray_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help=__doc__,
    # __main__ turns what the user can mend into a sentence; the rest keeps its plain traceback.
    pretty_exceptions_enable=False,
)


NOVELS_TARGET = Path(__file__).parent / "zoo" / "novels" / "target"

# What every command of training takes.
Data = Annotated[list[Path], typer.Option(help="Text file or folder; may be repeated.")]
Target = Annotated[Path, typer.Option(help="Folder of a transformers causal LM; it is not changed.")]
MaxSteps = Annotated[int, typer.Option(min=1)]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows per step.")]
Lr = Annotated[float, typer.Option(help="Muon step of the matrices.")]
AdamLr = Annotated[float, typer.Option(help="AdamW step of everything else.")]
DecayShare = Annotated[float, typer.Option(min=0, max=1, help="Last part of the steps, where lr falls to 0.")]
SaveSteps = Annotated[int, typer.Option(min=1)]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.")]


@app.callback()
def main() -> None:
    """Train reference targets, QuickMerge drafters and compressors."""


app.command("fetch", epilog=FETCH_EXAMPLES)(fetch)


@app.command("train-target")
def train_target_command(
    data: Data,
    valid: Annotated[list[Path], typer.Option(help="Text never trained on; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model.")],
    max_steps: MaxSteps = 1200,
    batch_size: BatchSize = 16,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    hidden_size: Annotated[int, typer.Option(help="A multiple of 64.")] = 192,
    num_layers: Annotated[int, typer.Option(min=1)] = 20,
    intermediate_size: Annotated[int, typer.Option(min=1)] = 512,
    vocab_size: Annotated[int, typer.Option(min=257)] = 4096,
    context: Annotated[int, typer.Option(help="Declared context length in tokens.")] = 4096,
    lr: Lr = 0.02,
    adam_lr: AdamLr = 3e-3,
    decay_share: DecayShare = 0.5,
    save_steps: SaveSteps = 100,
    seed: int = 0,
    init_from: Annotated[Path | None, typer.Option(help="Go on from this trained target.")] = None,
    resume: Resume = False,
) -> None:
    """Train a small deep Llama on a folder of text.

    Example: `qm-spec train-target --data novels/train --valid novels/valid --out target`
    """
    from qm_spec.training.loop import LoopSettings
    from qm_spec.training.target import train_target

    loop = LoopSettings(max_steps, batch_size, lr, adam_lr, decay_share=decay_share, save_steps=save_steps, seed=seed)
    stage = train_target(
        data,
        valid,
        out,
        loop=loop,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=intermediate_size,
        context=context,
        sequence_length=sequence_length,
        init_from=init_from,
        resume=resume,
    )
    typer.echo(f"saved {out}: {stage['valid_loss_nats_per_token']:.3f} nats per token")


@app.command("train")
def train_command(
    target: Target,
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH",
            help="Answers that `qm-spec data` wrote, conversations (JSON lines with messages), or text; repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new drafter.")],
    drafter: Annotated[str, typer.Option(help="quickmerge; eagle3 or eagle3-window to compare with.")] = "quickmerge",
    epochs: Annotated[float, typer.Option(min=0, help="Times that the data is seen.")] = 2.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps, in place of epochs.")] = None,
    rows_per_step: Annotated[int, typer.Option(min=1, help="Positions of a step that the loss is taken at.")] = 1024,
    rows_per_document: Annotated[
        int | None,
        typer.Option(min=1, help="Of them at most so many in one document, chosen anew each time.", show_default="all"),
    ] = None,
    draft_vocab_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Draft only the N most frequent tokens.", show_default="all tokens"),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=32, help="Tokens per window of text.")] = 1024,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, help="Draft steps unrolled; default K.")] = 4,
    regenerated_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that the target writes behind passages of the text, as data.")
    ] = 0,
    intermediate_size: Annotated[int | None, typer.Option(help="Of the MLP; the target's by default.")] = None,
    aux_layers: Annotated[
        str | None,
        typer.Option(
            metavar="L,L,L",
            help="Layers whose input states are read, 0 = the embedding.",
            show_default="0, 2L/3, L - 1",
        ),
    ] = None,
    lookup_length: Annotated[
        int, typer.Option(help="In vLLM, copy what followed when this many last tokens stood there before; 0 = never.")
    ] = 4,
    window: Annotated[int, typer.Option(help="Tokens kept raw.")] = 512,
    group_size: Annotated[int, typer.Option(help="Tokens merged together.")] = 16,
    schedule: Annotated[str, typer.Option(help="Entries per group at each level; 0 = none.")] = "8,4,2,1",
    saliency: Annotated[str, typer.Option(help="entropy or inverse_entropy.")] = "entropy",
    lr: Lr = 0.02,
    adam_lr: AdamLr = 3e-3,
    decay_share: DecayShare = 0.5,
    save_steps: SaveSteps = 100,
    seed: int = 0,
    data_seed: Annotated[int | None, typer.Option(help="Of the choice of documents.", show_default="seed")] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Go on from this trained drafter. Its draft vocabulary stays, unless --draft-vocab-size is given, too."
        ),
    ] = None,
    states: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep what the target computes there: further epochs and drafters do not run it (4.6 KB per token "
            "and 576 units of width).",
        ),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Of the target over several GPUs, e.g. auto; see transformers.")
    ] = None,
    resume: Resume = False,
) -> None:
    """Train a QuickMerge drafter for a target, or EAGLE-3 with as many parameters; the target is frozen.

    Several GPUs: `accelerate launch -m qm_spec train ...` trains on each of them.

    Example: `qm-spec train --target my-model --data answers/ --draft-vocab-size 8192 --out my-model/qm_spec`

    Example: `qm-spec train --target my-model --data texts/ --regenerated-tokens 1000000 --out my-model/qm_spec`
    """
    import logging

    from qm_spec.config import MergeConfig
    from qm_spec.training.drafter import train_drafter
    from qm_spec.training.loop import LoopSettings

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qm_spec").setLevel(logging.INFO)
    stage = train_drafter(
        target,
        data,
        out,
        loop=LoopSettings(
            max_steps or 0,
            rows_per_step,
            lr,
            adam_lr,
            decay_share=decay_share,
            save_steps=save_steps,
            seed=seed,
            epochs=epochs,
        ),
        merge=MergeConfig(window, group_size, tuple(int(n) for n in schedule.split(",")), saliency),
        kind=drafter,
        num_speculative_tokens=num_speculative_tokens,
        intermediate_size=intermediate_size,
        aux_layers=None if aux_layers is None else [int(layer) for layer in aux_layers.split(",")],
        lookup_length=lookup_length,
        draft_vocab_size=draft_vocab_size,
        sequence_length=sequence_length,
        rows_per_document=rows_per_document,
        regenerated_tokens=regenerated_tokens,
        init_from=init_from,
        states_dir=states,
        data_seed=data_seed,
        device_map=device_map,
        resume=resume,
    )
    length = stage["valid_acceptance_length"]
    typer.echo(f"saved {out}: acceptance length {length:.2f} on validation documents")


@app.command("compress-train")
def compress_train_command(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the new compressor.")],
    target: Annotated[
        Path,
        typer.Option(help="Folder of a transformers causal LM; it is not changed.", show_default="the shipped one"),
    ] = NOVELS_TARGET,
    layer: Annotated[int, typer.Option(min=0, help="Whose states are compressed; 0 = the embeddings.")] = 5,
    keep: Annotated[int, typer.Option(min=1, help="K, tokens kept of each window or chunk.")] = 32,
    chunk_size: Annotated[int | None, typer.Option(min=1, help="Keep K tokens of every so many.")] = None,
    grouping: Annotated[str, typer.Option(help="cosine or kmeans.")] = "cosine",
    saliency: Annotated[str, typer.Option(help="learned, entropy, inverse_entropy or norm.")] = "learned",
    causal: Annotated[bool, typer.Option(help="No merged token holds a token later than its place.")] = False,
    prior_layers: Annotated[int, typer.Option(min=1, help="Layers of the prior.")] = 2,
    gamma: Annotated[float, typer.Option(min=0, max=1, help="Strictness of the fidelity; 1 counts every error.")] = 0.8,
    alpha: Annotated[float, typer.Option(min=0, help="Weight of the alignment loss.")] = 0.1,
    start_temperature: Annotated[float, typer.Option(help="Of the selection, at the first step.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="After three quarters of the steps, and from then on.")] = 0.1,
    max_steps: MaxSteps = 600,
    batch_size: BatchSize = 8,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    lr: Lr = 0.02,
    adam_lr: AdamLr = 1e-3,
    decay_share: DecayShare = 0.5,
    save_steps: SaveSteps = 100,
    seed: int = 0,
    resume: Resume = False,
) -> None:
    """Train a compressor (saliency and prior) on a frozen target's states of a text; no drafter is involved.

    Example: `qm-spec compress-train --data novels/train --layer 5 --keep 32 --out compressor`
    """
    from qm_spec.quickmerge import TemperatureSchedule
    from qm_spec.training.compressor import train_compressor
    from qm_spec.training.loop import LoopSettings

    stage = train_compressor(
        target,
        data,
        out,
        loop=LoopSettings(
            max_steps, batch_size, lr, adam_lr, decay_share=decay_share, save_steps=save_steps, seed=seed
        ),
        layer=layer,
        keep=keep,
        sequence_length=sequence_length,
        alpha=alpha,
        schedule=TemperatureSchedule(start_temperature, temperature, max(1, 3 * max_steps // 4)),
        resume=resume,
        chunk_size=chunk_size,
        grouping=grouping,
        saliency=saliency,
        causal=causal,
        prior_layers=prior_layers,
        gamma=gamma,
    )
    before, after = (stage[f"valid_{when}"] for when in ("before", "after"))
    changes = ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in after)
    typer.echo(f"saved {out}: on validation text {changes}")


@app.command("simulate")
def simulate_command(
    target_config: Annotated[Path, typer.Option(metavar="FILE|DIR", help="config.json of the target, or its folder.")],
    hardware: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="h100, h200, cpu, or a file as measure-hardware writes it.")
    ] = "h100",
    acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|P,...", help="results.json of a benchmark, or shares kept per position: 0.8,0.6,0.5"
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Whose runs of the results are taken; ngram needs no drafter, eagle3 attends to all.")
    ] = "qm_spec",
    drafter: Annotated[
        Path | None,
        typer.Option(metavar="FILE|DIR", help="config.json of the drafter.", show_default="one of the target's sizes"),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="B,...", help="Requests in a step.")] = "1,8,32,128",
    context: Annotated[str, typer.Option(metavar="L,...", help="Tokens of context; 128k and 1M work.")] = "1k,8k,128k",
    num_speculative_tokens: Annotated[
        str | None, typer.Option(metavar="K,...", help="As 1..4 or 2,4.", show_default="all of known acceptance")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16, float32 or float8; keys and values take 2 bytes or 4.")
    ] = ("bfloat16"),
    tensor_parallel: Annotated[int, typer.Option(help="Devices of one replica.")] = 1,
    max_num_seqs: Annotated[int, typer.Option(help="Most requests in a step of a replica.")] = 256,
    arrival_rate: Annotated[
        float | None, typer.Option(help="Requests per second over all replicas: simulates traffic, too.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Of the traffic.")] = 1,
    num_requests: Annotated[
        int | None, typer.Option(help="That arrive in all.", show_default="200 per replica, 2000 at least")
    ] = None,
    output_tokens: Annotated[int, typer.Option(help="Mean length of an output.")] = 256,
    ttft_limit_ms: Annotated[float | None, typer.Option(help="Later first tokens are no goodput.")] = None,
    tpot_limit_ms: Annotated[float | None, typer.Option(help="Slower further tokens are no goodput.")] = None,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    validate: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE|DIR", help="Instead, predict these results.json and show the errors; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON there.")] = None,
) -> None:
    """Predict speed-up on machines, lengths and traffic that were not measured, with a roofline model.

    Everything it prints is a prediction; docs/results/simulation.md says how far it is off.

    Example: `qm-spec simulate --target-config llama/config.json --hardware h200 --acceptance results/results.json`

    Example: `qm-spec simulate --target-config llama --acceptance 0.8,0.65,0.5 --tensor-parallel 8 --context 128k,1M`

    Example: `qm-spec simulate --target-config llama --acceptance 0.8,0.65 --arrival-rate 900 --replicas 100`

    Example: `qm-spec simulate --target-config model --drafter model/qm_spec --hardware mine.json --validate results`
    """
    import json

    from rich.console import Console

    from qm_spec.provenance import write_record
    from qm_spec.simulation.hardware import load_hardware
    from qm_spec.simulation.run import Simulation, simulate
    from qm_spec.simulation.run import validate as validate_runs

    console = Console(quiet=as_json, width=max(150, Console().width))
    if validate and acceptance is None:
        answer = validate_runs(validate, target_config, load_hardware(hardware), drafter, console)
    elif acceptance is None or validate:
        raise ValueError(
            "simulate: give either --acceptance to predict with or --validate to compare with, and not both"
        )
    else:
        simulation = Simulation(
            target_config=target_config,
            hardware=hardware,
            acceptance=acceptance,
            method=method,
            drafter=drafter,
            batches=batch,
            contexts=context,
            depths=num_speculative_tokens,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
            max_num_seqs=max_num_seqs,
            arrival_rate=arrival_rate,
            replicas=replicas,
            num_requests=num_requests,
            output_tokens=output_tokens,
            ttft_limit_ms=ttft_limit_ms,
            tpot_limit_ms=tpot_limit_ms,
            seed=seed,
        )
        answer = simulate(simulation, console)
    if as_json:
        typer.echo(json.dumps(answer, indent=1))
    if out is not None:
        write_record(out, answer)


@app.command("measure-hardware")
def measure_hardware_command(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Hardware file, for simulate.")],
    name: Annotated[str, typer.Option(help="Of the device, for the tables.")] = "this machine",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure what this machine reaches: a copy's bytes and a matrix product's operations per second.

    The overheads in the file stay 0; what a step of plain decoding takes beyond its prediction is step_overhead_s.

    Example: `qm-spec measure-hardware --out mine.json`
    """
    from qm_spec.simulation.measure import measure_hardware

    found = measure_hardware(name, device)
    found.write(out)
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in found.flops_per_s.items())
    typer.echo(f"saved {out}: {found.memory_bytes_per_s / 1e9:.1f} GB/s, {rates}")


@app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A", help="Results file, or a folder with one.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another, measured on the same prompts.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling of prompts.")] = 0,
) -> None:
    """Compare two results prompt by prompt: per setting and metric the difference, its interval and a verdict.

    Example: `qm-spec compare results/before results/after`
    """
    from qm_spec.evaluation.compare import compare_results, format_comparisons
    from qm_spec.evaluation.results import read_results

    typer.echo(format_comparisons(compare_results(read_results(before), read_results(after), seed)))


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results, with a results.json.")],
) -> None:
    """Write a folder's results as one self-contained page, report.html, and as report.md with its plots.

    Example: `qm-spec report results/`
    """
    from qm_spec.evaluation.report.render import write_report

    page, markdown = write_report(folder)
    typer.echo(f"saved {page} and {markdown}")


EVAL_EXAMPLES = """
Example: `qm-spec eval --methods none,none-again,qm_spec --out results/mine`, then `qm-spec report results/mine`

Example: `qm-spec eval --target my-model --benchmark spec_bench --data data --skip-long --ray 4`

Example: `qm-spec eval --target /shared/my-model --ray 16 --ray-address auto --num-cpus 8 --num-gpus 1 --resume`

Example: `qm-spec eval --target my-model --sweep num_speculative_tokens=1..8 concurrency=1,8,32 temperature=0,1`
"""
app.command("eval", epilog=EVAL_EXAMPLES)(evaluate)


@app.command("generate")
def generate_command(
    target: Target,
    input_file: Annotated[
        Path, typer.Option("--input", metavar="FILE", help="Rows with 'text', 'prompt' or OpenAI 'messages'.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="One JSON line for each row, in the same order.")],
    method: Annotated[
        str, typer.Option(help="qm_spec, qm_spec-lookup, ngram, or none for plain decoding.")
    ] = "qm_spec",
    draft: Annotated[
        str, typer.Option(metavar="DIR|qm_spec", help="Drafter folder, or qm_spec to find the target's own.")
    ] = "qm_spec",
    num_speculative_tokens: Annotated[
        int | None, typer.Option(metavar="K", help="Drafted tokens per step.", show_default="the drafter's, or 4")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most output tokens; an end-of-text token ends sooner.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    concurrency: Annotated[int, typer.Option(help="Requests kept in flight by each engine.")] = 8,
    seed: Annotated[int, typer.Option(help="Of sampling; row i takes seed + i.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (the model's own), bfloat16, float16 or float32.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run has generated.")] = False,
    ray: Annotated[int, typer.Option(metavar="N", help="Share the rows among N Ray actors, an engine each.")] = 0,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running cluster, or auto.", show_default="one on this machine")
    ] = None,
    num_cpus: Annotated[float, typer.Option(help="Cores per actor.")] = 1.0,
    num_gpus: Annotated[
        float | None, typer.Option(help="GPUs per actor.", show_default="1 where this machine has one, else 0")
    ] = None,
) -> None:
    """Answer a file of prompts offline; a row that cannot be answered gets an error in its place.

    Example: `qm-spec generate --target my-model --input prompts.jsonl --output answers.jsonl --ray 4`
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from qm_spec.evaluation.generate import Generation, GenerationSettings

    generation = Generation(
        GenerationSettings(
            target=target,
            input=input_file,
            output=output,
            method=method,
            draft=draft,
            num_speculative_tokens=num_speculative_tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            concurrency=concurrency,
            seed=seed,
            dtype=dtype,
            ray=ray_settings(ray, ray_address, num_cpus, num_gpus),
            resume=resume,
        )
    )
    # Ended by the system or by Ctrl-C, the engines are ended too, and --resume goes on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("rows", total=generation.num_rows)
        try:
            generation.run(lambda done, total: progress.update(bar, completed=done))
        except KeyboardInterrupt as interruption:
            typer.echo("interrupted; --resume goes on with what is finished", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from interruption
    typer.echo(f"saved {output}: {generation.num_rows} rows, {generation.num_errors} of them with an error")
    if generation.num_errors:
        raise typer.Exit(1)


app.command("data", epilog=DATA_EXAMPLES)(answer)


if __name__ == "__main__":
    app()
