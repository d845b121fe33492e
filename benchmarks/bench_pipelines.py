"""What the pipelines save, in bytes of their tensors, and what it costs: perplexity and output error by ratio."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from script import NOVELS, run_main, split_list, with_plain_errors

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor
    from transformers import PreTrainedModel

    from qm_spec.compression.kv_cache import QuickMergeCache


PARTS = ("diffusion", "llm", "multimodal")
# Methods beside ours in the multimodal and the diffusion part, by their names in qm_spec.bench.reduction.
OTHERS = ("tome", "random-merge", "uniform", "random")

EXAMPLES = """
Examples:

    python benchmarks/bench_pipelines.py

    python benchmarks/bench_pipelines.py --parts llm --text novels/valid --windows 16 --context 2048

    python benchmarks/bench_pipelines.py --parts llm --target MODEL --text FILE --saliency inverse_entropy
"""


@with_plain_errors
def main(
    parts: Annotated[str, typer.Option(metavar="P,...", help="Of diffusion, llm and multimodal.")] = ",".join(PARTS),
    target: Annotated[
        Path, typer.Option(metavar="DIR", help="A language model and its tokenizer.", show_default="the shipped pair's")
    ] = NOVELS / "target",
    text: Annotated[
        Path, typer.Option(metavar="PATH", help="Text: a file or folder.", show_default="the prompts")
    ] = NOVELS / "prompts.jsonl",
    ratios: Annotated[str, typer.Option(metavar="R,...", help="Tokens over tokens kept.")] = "1,2,4",
    context: Annotated[int, typer.Option(metavar="C", help="Tokens of the cache that is compressed.")] = 512,
    continuation: Annotated[int, typer.Option(metavar="T", help="Tokens after it, whose prediction counts.")] = 64,
    windows: Annotated[int, typer.Option(metavar="W", help="Windows of C + T tokens, drawn from the text.")] = 2,
    recent: Annotated[int, typer.Option(metavar="N", help="Newest tokens that the cache keeps as they are.")] = 64,
    saliency: Annotated[str, typer.Option(help="Of keys: norm, entropy or inverse_entropy.")] = "norm",
    images: Annotated[int, typer.Option(metavar="N", help="Images and prompts of the other two parts.")] = 8,
    seed: Annotated[int, typer.Option(metavar="S", help="Of windows, random models and images.")] = 0,
    threads: Annotated[int, typer.Option(metavar="T", help="Of torch.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results.")] = Path("results/bench_pipelines.json"),
) -> None:
    """Compare compressed with uncompressed models, part by part, beside simple ways to save as much.

    llm: a text's continuation after a context whose key-value cache was compressed, on a real model.
    multimodal and diffusion: the relative error of the output, ||y - y'|| / ||y||, of small models of
    random weights, which say how far the output moves, and nothing about how good it is.
    """
    from qm_spec.provenance import write_record

    results = measure(
        split_list(parts),
        [float(ratio) for ratio in split_list(ratios)],
        Llm(target, text, context, continuation, windows, recent, saliency, seed),
        images,
        seed,
        threads,
    )
    write_record(out, results)
    typer.echo(format_tables(results))
    typer.echo(f"results: {out}", err=True)


@dataclass(frozen=True)
class Llm:
    """Settings of the language model's part, as the command line names them."""

    target: Path
    text: Path
    context: int
    continuation: int
    windows: int
    recent: int
    saliency: str
    seed: int
    sinks: int = 4


def measure(
    parts: Sequence[str], ratios: Sequence[float], llm: Llm, images: int, seed: int, threads: int
) -> dict[str, Any]:
    """Return the results of all parts.

    Raises:
        OSError: target or text is missing.
        ValueError: a setting is out of range, or the text too short.
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging

    from qm_spec import provenance
    from qm_spec.bench.environment import describe_environment

    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise ValueError(f"parts: must be of {sorted(PARTS)}, got {unknown or 'none'}")
    if not ratios or min(ratios) < 1:
        raise ValueError(f"ratios: must be at least 1, got {list(ratios)}")
    if min(llm.windows, llm.recent, llm.continuation - 1, images) < 1:
        raise ValueError("windows, recent and images must be at least 1, and continuation at least 2")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    logging.disable_progress_bar()
    results: dict[str, Any] = {
        "schema_version": 1,
        **provenance.conditions(),
        "environment": describe_environment() | {"threads": threads},
    }
    measures: dict[str, Callable[[Progress], dict[str, Any]]] = {
        "llm": lambda progress: measure_llm(llm, ratios, progress),
        "multimodal": lambda progress: measure_multimodal(ratios, images, seed, progress),
        "diffusion": lambda progress: measure_diffusion(ratios, images, seed, progress),
    }
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for part in parts:
            results[part] = measures[part](progress)
    return results


# The language model's cache


def cache_methods(model: PreTrainedModel, settings: Llm) -> dict[str, Callable[[int], QuickMergeCache]]:
    """Return for each method how its cache is made, from the entries that attention may read."""
    import torch

    from qm_spec.compression.kv_cache import PROPORTIONAL, QuickMergeCache
    from qm_spec.compression.kv_merging import KeyValueEntries, KeyValueMerger
    from qm_spec.compression.rotary import Rotary
    from qm_spec.quickmerge import Grouping

    class Evict(KeyValueMerger):
        """Keep the salient entries as they are and drop the others."""

        def group(
            self, content: Tensor, entries: KeyValueEntries, mergeable: Tensor, budget: Tensor
        ) -> tuple[Grouping, Tensor]:
            grouping, mass = super().group(content, entries, mergeable, budget)
            stays = torch.zeros(len(mass), mass.shape[1] + 1, dtype=torch.bool)
            stays = stays.scatter(1, grouping.place, True)[:, :-1]
            return Grouping(grouping.cluster.masked_fill(~stays, -1), grouping.place, grouping.live), mass

    class Newest(Evict):
        """Keep the newest entries."""

        def score(self, content: Tensor, mergeable: Tensor) -> Tensor:
            return mergeable.cumsum(-1) / mergeable.shape[1]

    rotary = Rotary.from_model(model)
    token_bytes = 2 * 4 * 2 * len(rotary.inverse_frequencies)

    def make(merger: KeyValueMerger, entries: int, proportional: bool = False) -> QuickMergeCache:
        model.set_attn_implementation(PROPORTIONAL if proportional else "sdpa")
        k_max = entries - settings.sinks - settings.recent
        return QuickMergeCache(
            model,
            k_max=k_max,
            window=settings.recent,
            sinks=settings.sinks,
            merger=merger,
            proportional=proportional,
        )

    def newest(entries: int) -> QuickMergeCache:
        # As many more tokens as the bookkeeping of merged entries takes, 12 bytes each.
        return make(Newest(rotary=rotary), min(entries * (token_bytes + 12) // token_bytes, settings.context))

    scored = partial(KeyValueMerger, settings.saliency)
    return {
        "merge": partial(make, scored(rotary=rotary)),
        "merge, proportional": partial(make, scored(epsilon=0.01, rotary=rotary), proportional=True),
        "merge, rotation ignored": partial(make, scored()),
        "merge, 64 tokens at a time": partial(make, scored(rotary=rotary)),
        "evict, same scores": partial(make, Evict(settings.saliency, rotary=rotary)),
        "newest, same bytes": newest,
    }


def fill(cache: QuickMergeCache, layers: Sequence[tuple[Tensor, Tensor]], step: int) -> None:
    """Hand the prompt's keys and values to a cache, `step` tokens at a time."""
    for index, (keys, values) in enumerate(layers):
        for key, value in zip(keys.split(step, dim=2), values.split(step, dim=2), strict=True):
            cache.update(key, value, index)


def measure_llm(settings: Llm, ratios: Sequence[float], progress: Progress) -> dict[str, Any]:
    """Return perplexity, divergence and bytes by ratio and method."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    from qm_spec.bench.reduction.language_model import cut_windows
    from qm_spec.bench.results.bootstrap import estimate_mean
    from qm_spec.compression.sizes import nbytes
    from qm_spec.training.data import find_files, read_documents, sha256_of

    if not (settings.target / "config.json").is_file():
        raise FileNotFoundError(f"target: {settings.target} holds no config.json")
    kept = {ratio: int(settings.context / ratio) for ratio in ratios}
    if min(kept.values()) <= settings.recent + settings.sinks:
        raise ValueError(
            f"ratios: {max(ratios)} of {settings.context} tokens leaves {min(kept.values())}, no more than "
            f"{settings.recent} recent ones and {settings.sinks} first ones; pass a longer --context or fewer --recent"
        )
    tokenizer = AutoTokenizer.from_pretrained(settings.target)
    model = AutoModelForCausalLM.from_pretrained(settings.target, dtype=torch.float32).eval()
    files = find_files([settings.text])
    documents = [tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"] for one in read_documents(files)]
    windows = cut_windows(documents, settings.context + settings.continuation, settings.windows, settings.seed)
    methods = cache_methods(model, settings)
    runs = [(ratio, name) for ratio in ratios for name in methods]
    scores: dict[Any, list[tuple[float, float, int]]] = {run: [] for run in [None, *runs]}
    task = progress.add_task("llm", total=len(windows))
    for ids in windows.split(1):
        model.set_attn_implementation("sdpa")
        context, rest = ids[:, : settings.context], ids[:, settings.context :]
        whole = DynamicCache()
        model(context, past_key_values=whole)
        layers = [(layer.keys, layer.values) for layer in whole.layers]
        full_bytes = nbytes(tensor for pair in layers for tensor in pair)
        expected = model(rest, past_key_values=whole).logits[0].log_softmax(-1)

        def score(found: Tensor, rest: Tensor = rest, expected: Tensor = expected) -> tuple[float, float]:
            nats = F.nll_loss(found[:-1], rest[0, 1:]).item()
            return nats, F.kl_div(found, expected, log_target=True, reduction="batchmean").item()

        scores[None].append((*score(expected), full_bytes))
        for ratio, name in runs:
            cache = methods[name](kept[ratio])
            fill(cache, layers, 64 if "at a time" in name else settings.context)
            # Kept tokens need no bookkeeping.
            kept_bytes = nbytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
            stored = cache.nbytes if name.startswith("merge") else kept_bytes
            found = model(rest, past_key_values=cache).logits[0].log_softmax(-1)
            scores[ratio, name].append((*score(found), stored))
        progress.advance(task)

    plain = [nats for nats, _, _ in scores[None]]
    full_bytes = scores[None][0][2]
    rows = []
    for (ratio, name), measured in ((run, scores[run]) for run in runs):
        nats = [one for one, _, _ in measured]
        more = [one - other for one, other in zip(nats, plain, strict=True)]
        found = estimate_mean(more)
        rows.append(
            {
                "ratio": ratio,
                "method": name,
                "perplexity": math.exp(statistics.fmean(nats)),
                "nats_more": found.value,
                "nats_more_interval": (found.low, found.high),
                "kl_nats": statistics.fmean(kl for _, kl, _ in measured),
                "bytes": measured[0][2],
                "bytes_ratio": full_bytes / measured[0][2],
            }
        )
    return {
        "settings": {
            "target": settings.target.name,
            "context": settings.context,
            "continuation": settings.continuation,
            "windows": len(windows),
            "recent": settings.recent,
            "sinks": settings.sinks,
            "saliency": settings.saliency,
            "seed": settings.seed,
        },
        "data": {"files": [file.name for file in files], "sha256": sha256_of(files)},
        "whole": {"perplexity": math.exp(statistics.fmean(plain)), "bytes": full_bytes},
        "rows": rows,
    }


# Models of random weights


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return `||found - exact|| / ||exact||`."""
    return ((found - exact).norm() / exact.norm()).item()


def smooth_noise(count: int, channels: int, size: int, seed: int) -> Tensor:
    """Return images `[count, channels, size, size]` whose neighbouring pixels are alike, as in pictures."""
    import torch
    from torch.nn import functional as F

    noise = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 4, 4, generator=noise)
    fine = torch.randn(count, channels, size, size, generator=noise)
    return F.interpolate(coarse, size=(size, size), mode="bicubic") + 0.1 * fine


def reducers(seed: int) -> Iterator[tuple[str, Callable[[Tensor, int], Any]]]:
    """Yield names and functions of tokens `[B, N, D]` and K; the first is what the pipelines take by default."""
    from qm_spec.bench.reduction import find_methods
    from qm_spec.compression.token_compressor import compress_tokens

    yield "ours", compress_tokens
    yield "ours, entropy", partial(compress_tokens, saliency="entropy")
    yield "ours, cosine", partial(compress_tokens, grouping="cosine")
    yield "ours, norm, cosine", partial(compress_tokens, saliency="norm", grouping="cosine")
    for method in find_methods(OTHERS):
        yield method.name, method.make(seed)


def measure_multimodal(ratios: Sequence[float], images: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Return the error of a LLaVA's logits when image tokens are merged, and that of the fusing pipeline."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, set_seed

    from qm_spec import create_multimodal_pipeline
    from qm_spec.compression.adapters.vlm import merge_image_tokens
    from qm_spec.compression.kv_cache import PROPORTIONAL, QuickMergeCache
    from qm_spec.quickmerge.merging import unmerge

    set_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=4
    )
    language = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    # Weights of unit gain: with the default of 0.02 attention would be uniform, and nothing could go wrong.
    for part in (vision, language):
        part.initializer_range = part.hidden_size**-0.5
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=language, image_token_id=255)
    ).eval()
    num_tokens = (64 // 4) ** 2
    pixels = smooth_noise(images, 3, 64, seed)
    ids = torch.randint(255, (images, 4 + num_tokens + 16))
    ids[:, 4 : 4 + num_tokens] = 255
    exact = model(input_ids=ids, pixel_values=pixels).logits[:, -16:]

    image_tokens = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    text_tokens = model.get_input_embeddings()(ids[:, -16:])
    total = image_tokens.shape[1] + text_tokens.shape[1]
    pipeline: Any = create_multimodal_pipeline(128, 128, 64, total).eval()
    whole, _ = pipeline(image_tokens, text_tokens)

    class Reduce(torch.nn.Module):
        """Stand in for the pipeline's compressor."""

        def __init__(self, compress: Callable[[Tensor, int], Any]) -> None:
            super().__init__()
            self.compress = compress

        def forward(self, tokens: Tensor, keep: int, token_mask: None) -> Any:
            return self.compress(tokens, keep)

    rows = []
    task = progress.add_task("multimodal", total=len(ratios))
    for ratio in ratios:
        for name, compress in reducers(seed):
            prompt, info = merge_image_tokens(model, int(num_tokens / ratio), ids, pixels, compress=compress)
            error = relative_error(model(**prompt).logits[:, -16:], exact)
            row = {"asked": ratio, "method": name} | numbers(info)
            rows.append(row | {"what": "image tokens", "error": error})
            model.set_attn_implementation(PROPORTIONAL)
            sizes = {"token_sizes": info["token_sizes"], "position_ids": prompt["position_ids"]}
            cache = QuickMergeCache(model, ratio=1.0, **sizes, proportional=True)
            error = relative_error(model(**prompt, past_key_values=cache).logits[:, -16:], exact)
            model.set_attn_implementation("sdpa")
            rows.append(
                {"asked": ratio, "what": "image tokens, weighed by size", "method": name, "error": error}
                | numbers(info)
            )
            # Each token is given its fused token's output; a dropped one has none.
            pipeline.k_max, pipeline.compressor = int(total / ratio), Reduce(compress)
            fused, info = pipeline(image_tokens, text_tokens)
            error = relative_error(unmerge(fused, info["assignments"]), whole)
            row = {"asked": ratio, "method": name} | numbers(info)
            rows.append(row | {"what": "fused tokens", "error": error})
        progress.advance(task)
    return {"settings": {"images": images, "image_tokens": num_tokens, "text_tokens": 16, "seed": seed}, "rows": rows}


def numbers(info: dict[str, Any]) -> dict[str, Any]:
    """Return what of a pipeline's info is no tensor."""
    return {key: value for key, value in info.items() if isinstance(value, int | float)}


def measure_diffusion(ratios: Sequence[float], images: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Return the error of a UNet's prediction when prompt tokens or its features are merged."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, set_seed

    from qm_spec.compression.adapters.diffusers import PromptMerger, merged_attention

    set_seed(seed)
    length, size = 77, 32
    text = CLIPTextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        eos_token_id=255,
    )
    text.initializer_range = text.hidden_size**-0.5
    encoder = CLIPTextModel(text).eval()
    make_unet: Any = UNet2DConditionModel
    unet = make_unet(
        sample_size=size,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
    for name, weight in unet.named_parameters():
        if "to_q.weight" in name or "to_k.weight" in name:
            # PyTorch's default has a gain of 3 ** -0.5 and attention nearly uniform.
            weight.mul_(3**0.5)
    ids = torch.randint(1, 255, (images, length))
    for row in ids:
        # A begin token, a prompt of 8 to 40 tokens, and the end token as padding, as CLIP has them.
        row[0] = 0
        row[int(torch.randint(8, 41, ())) :] = 255
    embeds = encoder(ids).last_hidden_state
    latents = smooth_noise(images, 4, size, seed)
    exact = unet(latents, 500, embeds).sample

    rows = []
    task = progress.add_task("diffusion", total=len(ratios))
    for ratio in ratios:
        for name, compress in reducers(seed):
            prompt = PromptMerger(int(length / ratio), compress=compress).merge(embeds)
            plain = unet(latents, 500, prompt.prompt_embeds).sample
            with merged_attention(unet, log_size=prompt.log_size):
                weighed = unet(latents, 500, prompt.prompt_embeds).sample
            with merged_attention(unet, keep=1 / ratio, compress=compress):
                features = unet(latents, 500, embeds).sample
            found = {"prompt": plain, "prompt, weighed by size": weighed, "features": features}
            for what, sample in found.items():
                row = {"asked": ratio, "what": what, "method": name, "error": relative_error(sample, exact)}
                rows.append(row | ({} if what == "features" else numbers(prompt.info)))
        progress.advance(task)
    settings = {"images": images, "prompt_tokens": length, "features": size**2, "seed": seed}
    return {"settings": settings, "rows": rows}


# Tables


def format_tables(results: dict[str, Any]) -> str:
    """Return the tables of all parts in Markdown, each with its conditions."""
    from qm_spec.bench.results.table import align_table, difference_cell

    parts = []
    if "llm" in results:
        llm = results["llm"]
        header = ["method", "asked", "MiB", "measured", "perplexity", "nats more", "KL nats"]
        body = []
        for row in llm["rows"]:
            body.append(
                [
                    row["method"],
                    f"{row['ratio']:g}x",
                    f"{row['bytes'] / 2**20:.2f}",
                    f"{row['bytes_ratio']:.2f}x",
                    f"{row['perplexity']:.2f}",
                    difference_cell(row["nats_more"], row["nats_more_interval"], digits=4),
                    f"{row['kl_nats']:.4f}",
                ]
            )
        about = (
            "llm: {target}, {windows} windows, cache of {context} tokens ({sinks} first and {recent} recent "
            "ones kept), {continuation} tokens predicted; saliency of keys: {saliency}".format(**llm["settings"])
        )
        whole = "whole cache: {:.2f} MiB, perplexity {perplexity:.2f}".format(
            llm["whole"]["bytes"] / 2**20, **llm["whole"]
        )
        parts += [about, whole, align_table(header, body)]
    for name in ("multimodal", "diffusion"):
        if name in results:
            settings = ", ".join(f"{key} {value}" for key, value in results[name]["settings"].items())
            parts += [f"{name}, random weights: relative error of the output ({settings})", error_table(results[name])]
    return "\n\n".join(parts)


def error_table(part: dict[str, Any]) -> str:
    """Return what is merged and how by row, and the ratios by column."""
    from qm_spec.bench.results.table import align_table

    errors = {(row["what"], row["method"], row["asked"]): row["error"] for row in part["rows"]}
    ratios = sorted({row["asked"] for row in part["rows"]})
    runs = dict.fromkeys((what, method) for what, method, _ in errors)
    body = [
        [f"{what}: {method}", *(f"{errors[what, method, ratio]:.3f}" for ratio in ratios)]
        for what, method in sorted(runs, key=lambda run: run[0])
    ]
    return align_table(["merged", *(f"{ratio:g}x" for ratio in ratios)], body)


if __name__ == "__main__":
    run_main(main, EXAMPLES)
