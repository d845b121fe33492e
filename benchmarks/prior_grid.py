"""What each part of the prior's memory is worth: priors trained and tested with one thing changed."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

import typer
from long_context import ALL_DOMAINS, ZOO, Domains, Target, Text
from script import EXIT_BAD_INPUT, EXIT_INTERRUPTED, run_main

if TYPE_CHECKING:
    from torch import Tensor

    from qm_spec.config import MergeConfig
    from qm_spec.drafter.prior import PriorLayer, QuickMergePrior
    from qm_spec.evaluation.long_context import LongContextRow
    from qm_spec.ops.merge_entries import Merged

DEFAULT = "default"
# Longer than any text: nothing is merged.
ENDLESS = 1 << 20

EXAMPLES = """
Examples:

    python benchmarks/prior_grid.py --data longer --data some-fewer --states states --out results/grid

    python benchmarks/prior_grid.py --data longer --variants default,window-64,pruned --out results/grid

Variants that are trained already are not trained again.
"""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes:
        about: what it is.
        merge: settings of `MergeConfig`.
        saliency: masses `[..., M]` of a group's keys `[..., M, d]`, in place of the entropy's.
        merging: of a group's entries, in place of `merge_entries`.
        rotated: keys and queries tell positions by rotation.
        counted: an entry's count is added to its scores.
        sloped: scores fall with the distance.
    """

    about: str
    merge: dict[str, Any] = dataclasses.field(default_factory=dict)
    saliency: Callable[[Tensor], Tensor] | None = None
    merging: Callable[[Tensor, Tensor, Tensor, Tensor, int], Merged] | None = None
    rotated: bool = False
    counted: bool = True
    sloped: bool = True


def random_mass(keys: Tensor) -> Tensor:
    """Return uniform masses, the same ones for the same keys."""
    # The fractional part of a large multiple of a sum of floats has nothing to do with the keys' meaning.
    return (keys.detach().float().sum(-1) * 9973.0).frac().abs() + 0.01


def norm_mass(keys: Tensor) -> Tensor:
    """Return the keys' norms."""
    return keys.float().norm(dim=-1) + 1e-3


def learned_mass(keys: Tensor) -> Tensor:
    """Return masses that a key's first channel tells: a linear scorer, trained through the weighted means."""
    import torch

    return torch.nn.functional.softplus(keys[..., 0].float()) + 1e-3


def prune_entries(keys: Tensor, values: Tensor, mass: Tensor, count: Tensor, keep: int) -> Merged:
    """Keep the `keep` entries of the highest mass of each group as they are; see `merge_entries`."""
    import torch

    from qm_spec.ops.merge_entries import Merged

    stay = mass.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort(dim=-1).values
    wide = stay.unsqueeze(-1).expand(*stay.shape, keys.shape[-1])
    nowhere = torch.full_like(mass, -1, dtype=torch.int64)
    return Merged(
        keys.gather(-2, wide), values.gather(-2, wide), mass.gather(-1, stay), count.gather(-1, stay), nowhere
    )


def budget_entries(keys: Tensor, values: Tensor, mass: Tensor, count: Tensor, keep: int) -> Merged:
    """Keep up to `keep` entries of each group, in proportion to the entropy of its keys; see `merge_entries`.

    On average over a sequence it is two thirds of them, at least one each. Places left free count 0 tokens.
    """
    import torch
    from torch.nn.functional import normalize, one_hot

    from qm_spec.ops.attention_entropy import attention_entropy
    from qm_spec.ops.merge_entries import Merged, merge_entries

    if keep == 1:
        return merge_entries(keys, values, mass, count, keep)
    # A uniform group has log(R0); the most that there can be says nothing, what is missing of it does.
    spread = math.log(keys.shape[-2]) - attention_entropy(keys.detach()).mean(-1)
    share = spread / spread.mean(-1, keepdim=True).clamp_min(1e-6)
    own = (keep * 2 / 3 * share).round().clamp(1, keep).unsqueeze(-1)
    rank = mass.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    stays = rank < own
    unit = normalize(keys.detach().float(), dim=-1)
    nearest = (unit @ unit.mT).masked_fill(~stays.unsqueeze(-2), float("-inf")).argmax(-1)
    centre = torch.where(stays, torch.arange(keys.shape[-2], device=keys.device), nearest)
    # Those that stay have the first places, in order of their rank.
    cluster = rank.gather(-1, centre)
    member = one_hot(cluster, keep).to(mass.dtype)
    merged_mass = (member * mass.unsqueeze(-1)).sum(-2)
    weights = (member * mass.unsqueeze(-1) / merged_mass.clamp_min(1e-9).unsqueeze(-2)).mT
    merged_count = (member * count.unsqueeze(-1)).sum(-2)
    return Merged(weights @ keys, weights @ values, merged_mass, merged_count, cluster)


class Rotary:
    """A prior's layer whose keys and queries are rotated by their positions in half of their channels.

    The other half still tells what a token is wherever it stands, or nothing could be looked for.

    Args:
        layer: the prior.
        positions: `[B, T]`, of the newest tokens that the layer's next inputs know.
    """

    def __init__(self, layer: PriorLayer, positions: Tensor) -> None:
        self._layer, self.positions = layer, positions

    def __getattr__(self, name: str) -> Any:
        """Everything else is the layer's."""
        return getattr(self._layer, name)

    def keys_values(self, state: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """See `PriorLayer.keys_values`."""
        keys, values = self._layer.keys_values(state, embedding)
        return self._rotate(keys), values

    def query(self, embedding: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `PriorLayer.query`."""
        query, residual = self._layer.query(embedding, state)
        return self._rotate(query), residual

    def _rotate(self, x: Tensor) -> Tensor:
        import torch

        plain, real, imaginary = x.split([x.shape[-1] // 2, x.shape[-1] // 4, x.shape[-1] // 4], -1)
        rates = 10000.0 ** -torch.linspace(0, 1, real.shape[-1], device=x.device)
        angle = (self.positions.unsqueeze(-1) * rates).unsqueeze(-2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([plain, real * cos - imaginary * sin, real * sin + imaginary * cos], -1)


VARIANTS = {
    DEFAULT: Variant("window 128, groups of 16 merged to 8, 4, 2, 1"),
    "no-memory": Variant("a window of 128, nothing beyond", {"schedule": [0]}),
    "wide-window": Variant(
        "a window of 432, nothing beyond: as many keys as the default after 8192 tokens",
        {"window": 432, "schedule": [0]},
    ),
    "unmerged": Variant("all tokens raw", {"window": ENDLESS}),
    "window-64": Variant("window 64", {"window": 64}),
    "window-256": Variant("window 256", {"window": 256}),
    "window-512": Variant("window 512", {"window": 512}),
    "schedule-8": Variant("2x and no further", {"schedule": [8]}),
    "schedule-4": Variant("4x and no further", {"schedule": [4]}),
    "schedule-2": Variant("8x and no further", {"schedule": [2]}),
    "inverse-entropy": Variant("low entropy is salient", {"saliency": "inverse_entropy"}),
    "norm": Variant("large keys are salient", saliency=norm_mass),
    "learned": Variant("a learned linear scorer", saliency=learned_mass),
    "random": Variant("saliency at random", saliency=random_mass),
    "pruned": Variant("salient tokens stay as they are, the others are dropped", merging=prune_entries),
    "budget": Variant(
        "as many keys for a group as its entropy asks for, 8, 4, 2, 1 on average",
        {"schedule": [12, 6, 3, 1]},
        merging=budget_entries,
    ),
    "uncounted": Variant("no log(count)", counted=False),
    "flat": Variant("no slopes: a raw token's distance does not count", sloped=False),
    "rotary": Variant("rotary positions in half of the channels, no slopes", rotated=True, sloped=False),
}


def prior_of(variant: Variant) -> type[QuickMergePrior]:
    """Return the class of priors with this thing changed."""
    import torch

    from qm_spec.drafter import memory
    from qm_spec.drafter.prior import QuickMergePrior
    from qm_spec.drafter.rows import PriorRows, PriorSequences

    def mass(keys: Tensor, config: MergeConfig) -> Tensor:
        assert variant.saliency is not None
        return variant.saliency(keys)

    class RotatedRows(PriorRows):
        def __init__(self, sequences: PriorSequences, positions: Tensor) -> None:
            super().__init__(sequences, positions)
            self.layer: Any = Rotary(sequences.layer, positions)

        def step(self, embedding: Tensor) -> Tensor:
            if self.num_steps > 0:
                self.layer.positions = self.layer.positions + 1
            return super().step(embedding)

    class Sequences(PriorSequences):
        def __init__(self, layer: Any, config: MergeConfig, aux_states: Tensor, embeddings: Tensor) -> None:
            if variant.rotated:
                layer = Rotary(layer, torch.arange(aux_states.shape[1], device=aux_states.device).unsqueeze(0))
            with ExitStack() as stack:
                if variant.saliency is not None:
                    stack.enter_context(mock.patch.object(memory, "saliency_mass", mass))
                if variant.merging is not None:
                    stack.enter_context(mock.patch.object(memory, "merge_entries", variant.merging))
                super().__init__(layer, config, aux_states, embeddings)
            if not variant.counted:
                entries = self.memory.entries
                plain = dataclasses.replace(entries, count=entries.count.clamp_max(1))
                self.memory = dataclasses.replace(self.memory, entries=plain)
            if variant.rotated:
                self.layer = layer._layer

        def rows(self, positions: Tensor) -> PriorRows:
            return RotatedRows(self, positions) if variant.rotated else super().rows(positions)

    class Prior(QuickMergePrior):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if not variant.sloped:
                with torch.no_grad():
                    self.layer.slopes.zero_()
                    self.layer.far_bias.zero_()
                self.layer.slopes.requires_grad_(False)

        def read(self, aux_states: Tensor, embeddings: Tensor) -> PriorSequences:
            return Sequences(self.layer, self.config.merge, aux_states, embeddings)

    return Prior


def main(
    data: Annotated[list[Path], typer.Option(metavar="PATH", help="Text to train on; may be repeated.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the drafters and results.")],
    target: Target = ZOO / "target",
    text: Text = None,
    variants: Annotated[str, typer.Option(metavar="NAME,...", help="What to change.")] = ",".join(VARIANTS),
    states: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the target's states are kept.")] = None,
    max_steps: Annotated[int, typer.Option(metavar="N", help="Of training.")] = 240,
    regenerated_tokens: Annotated[int, typer.Option(metavar="N", help="That the target writes to train on.")] = 65536,
    intermediate_size: Annotated[int, typer.Option(metavar="N", help="Of the priors' MLP.")] = 768,
    domains: Domains = ALL_DOMAINS,
    lengths: Annotated[str, typer.Option(metavar="L,...", help="Tokens of the prompts.")] = "1024,8192",
    num_prompts: Annotated[int, typer.Option(metavar="N", help="Of each domain and length.")] = 8,
    num_tokens: Annotated[int, typer.Option(metavar="M", help="Tokens written behind each.")] = 64,
    seed: Annotated[int, typer.Option(metavar="S", help="Of training, prompts and windows.")] = 0,
    threads: Annotated[int, typer.Option(metavar="T", help="Of torch.")] = 1,
    train_only: Annotated[bool, typer.Option(help="Train what is missing and stop.")] = False,
) -> None:
    """Train a prior for each variant, on the same windows, and replay all of them on the same texts.

    Writes grid.json and grid.md to OUT; each prior is saved beside them.
    """
    import torch

    torch.set_num_threads(threads)
    names = variants.split(",")
    try:
        if unknown := [name for name in names if name not in VARIANTS]:
            raise ValueError(f"--variants: expected some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
        if not train_only and names[0] != DEFAULT:
            raise ValueError(f"--variants: the others are compared with {DEFAULT!r}; name it first, got {names[0]!r}")
        for name in names:
            train(name, target, data, out / name, states, max_steps, regenerated_tokens, intermediate_size, seed)
        if not train_only:
            sizes = [int(length) for length in lengths.split(",")]
            measure(
                names, target, text or [ZOO / "text"], out, domains.split(","), sizes, num_prompts, num_tokens, seed
            )
    except (ValueError, OSError) as error:
        print(f"prior_grid.py: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        print(f"prior_grid.py: stopped; the same command goes on with what is in {out}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def train(
    name: str,
    target: Path,
    data: Sequence[Path],
    out: Path,
    states: Path | None,
    max_steps: int,
    regenerated_tokens: int,
    intermediate_size: int,
    seed: int,
) -> None:
    """Train one variant in `out`, unless it is there; an interrupted training goes on.

    Raises:
        ValueError: what is there was trained for another target, number of steps or seed.
    """
    from qm_spec.config import MergeConfig
    from qm_spec.discovery import target_fingerprint
    from qm_spec.training import drafter as training
    from qm_spec.training.loop import LoopSettings

    if (out / "provenance.json").is_file():
        stage = json.loads((out / "provenance.json").read_text())["stages"][-1]
        wanted = {"target_fingerprint": target_fingerprint(target), "steps": max_steps, "seed": seed}
        if found := {key: stage[key] for key, value in wanted.items() if stage[key] != value}:
            raise ValueError(f"{out} was trained with {found}, and {wanted} is asked for; name another --out")
        return
    variant = VARIANTS[name]
    print(f"{name}: {variant.about}")
    with mock.patch.object(training, "QuickMergePrior", prior_of(variant)):
        training.train_drafter(
            target,
            data,
            out,
            loop=LoopSettings(max_steps=max_steps, batch_size=4, save_steps=80, seed=seed),
            merge=MergeConfig(**variant.merge),
            intermediate_size=intermediate_size,
            regenerated_tokens=regenerated_tokens,
            states_dir=states,
            data_seed=seed,
            resume=True,
        )


def measure(
    names: Sequence[str],
    target_dir: Path,
    text: Sequence[Path],
    out: Path,
    domains: Sequence[str],
    lengths: Sequence[int],
    num_prompts: int,
    num_tokens: int,
    seed: int,
) -> None:
    """Replay all variants, and the default one with its memory emptied, and write the results."""
    import torch
    from rich.progress import Progress
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qm_spec import provenance
    from qm_spec.config import MergeConfig
    from qm_spec.evaluation.long_context import measure_acceptance
    from qm_spec.training.data import find_files, sha256_of

    priors = {name: prior_of(VARIANTS[name]).from_pretrained(out / name, dtype=torch.float32).eval() for name in names}
    emptied = prior_of(VARIANTS[DEFAULT]).from_pretrained(out / DEFAULT, dtype=torch.float32).eval()
    emptied.config.merge = MergeConfig(schedule=(0,))
    priors["emptied"] = emptied
    stages = {name: json.loads((out / name / "provenance.json").read_text())["stages"][-1] for name in names}
    record: dict[str, Any] = {
        "command": provenance.command(),
        "commit": provenance.git_commit(),
        "versions": provenance.versions(),
        "text_sha256": sha256_of(find_files(text)),
        "seed": seed,
        "tokens_per_prompt": num_tokens,
        "variants": {
            name: {
                "about": VARIANTS[name].about,
                "valid_loss": stage["valid_loss"],
                "valid_acceptance_length": stage["valid_acceptance_length_teacher_forced"],
                "commit": stage["commit"],
            }
            for name, stage in stages.items()
        },
        "entries_attended": {
            name: [prior.config.merge.entries_attended(n) for n in lengths] for name, prior in priors.items()
        },
    }
    rows: list[LongContextRow] = []
    target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    with Progress() as progress:
        task = progress.add_task("replay", total=len(domains) * len(lengths) * num_prompts)
        for some in measure_acceptance(
            target,
            AutoTokenizer.from_pretrained(target_dir),
            priors,
            text,
            domains=domains,
            lengths=lengths,
            num_prompts=num_prompts,
            num_tokens=num_tokens,
            num_drafts=priors[names[0]].config.num_speculative_tokens,
            seed=seed,
            on_progress=lambda domain, length, _: progress.update(task, advance=1, description=f"{domain} {length}"),
        ):
            rows.extend(row for row in some if row.drafter in priors)
            record["rows"] = [dataclasses.asdict(row) for row in rows]
            (out / "grid.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "grid.md").write_text(table(record, rows))
    print(table(record, rows))


def over_all(name: str, rows: Sequence[LongContextRow]) -> LongContextRow:
    """Return a drafter's row over all domains and lengths; a prompt is one of a domain, at every length."""
    from qm_spec.evaluation.long_context import acceptance_length

    mine = [row for row in rows if row.drafter == name]
    tokens: list[int] = []
    steps: list[int] = []
    for domain in dict.fromkeys(row.domain for row in mine):
        some = [row for row in mine if row.domain == domain]
        tokens += [sum(counts) for counts in zip(*(row.tokens for row in some), strict=True)]
        steps += [sum(counts) for counts in zip(*(row.steps for row in some), strict=True)]
    return dataclasses.replace(
        mine[0], acceptance_length=acceptance_length(tokens, steps), tokens=tuple(tokens), steps=tuple(steps)
    )


def table(record: dict[str, Any], rows: Sequence[LongContextRow]) -> str:
    """Return a Markdown table: per variant its validation, its entries, and its acceptance over the default's."""
    found = {(row.drafter, row.domain, row.context): row for row in rows}
    cells = list(dict.fromkeys((row.domain, row.context) for row in rows))
    names = list(dict.fromkeys(row.drafter for row in rows))
    whole = {name: over_all(name, rows) for name in names}
    lines = [
        "| | validation AL | keys | all | " + " | ".join(f"{domain} {length}" for domain, length in cells) + " |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * len(cells),
    ]
    for name in names:
        stage = record["variants"].get(name)
        valid = "" if stage is None else f"{stage['valid_acceptance_length']:.2f}"
        shown = []
        pairs = [(whole[name], whole[DEFAULT])]
        pairs += [(found[name, domain, length], found[DEFAULT, domain, length]) for domain, length in cells]
        for row, base in pairs:
            if name == DEFAULT:
                shown.append(f"AL {row.acceptance_length.value:.2f}")
            else:
                ratio = row.over(base)
                spread = f" ({ratio.low:.2f}-{ratio.high:.2f})" if ratio.has_interval else ""
                shown.append(f"{ratio.value:.2f}{spread}")
        keys = record["entries_attended"][name][-1]
        lines.append(f"| {name} | {valid} | {keys} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main, EXAMPLES)
