"""What each kind of training is asked to do; a field with help is an option of its command."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypeVar

from typer import Option

from qm_spec.config import TRAINED_WINDOW, MergeConfig
from qm_spec.pairs import NOVELS

_Settings = TypeVar("_Settings", bound="LoopSettings")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long and how fast to train.

    Args:
        max_steps: optimizer steps; 0 for as many as `epochs` need.
        batch_size: sequences per step; of a data set of whole batches what its batches are measured in.
        warmup_steps: of linear warm-up; then constant, then linear decay over the last `decay_share`.
        epochs: times that a data set of whole batches is seen where `max_steps` is 0.
    """

    max_steps: Annotated[int, Option(min=1)] = 0
    batch_size: Annotated[int, Option(min=1, help="Windows per step.")] = 8
    lr: Annotated[float, Option(help="Muon step of the matrices.")] = 0.02
    adam_lr: Annotated[float, Option(help="AdamW step of everything else.")] = 3e-3
    warmup_steps: int = 20
    decay_share: Annotated[float, Option(min=0, max=1, help="Last part of the steps, where lr falls to 0.")] = 0.5
    save_steps: Annotated[int, Option(min=1, help="Steps between checkpoints, each with a validation.")] = 100
    seed: Annotated[int, Option(help="Of initialisation and the order of the data.")] = 0
    epochs: float = 1.0
    resume: Annotated[bool, Option(help="Go on from the last checkpoint in OUT.")] = False

    def fitted(self: _Settings, batches: int) -> _Settings:
        """Return settings with the steps that see a data set of so many batches as often as asked."""
        if self.max_steps:
            return self
        return replace(self, max_steps=max(1, round(self.epochs * batches)))


@dataclass(frozen=True, kw_only=True)
class TargetSettings(LoopSettings):
    """A small deep Llama, trained on text; sizes and tokenizer of `init_from` stay."""

    data: Annotated[list[Path], Option(help="Text file or folder; may be repeated.")]
    valid: Annotated[list[Path], Option(help="Text never trained on; may be repeated.")]
    out: Annotated[Path, Option(help="Folder of the new model.")]
    max_steps: Annotated[int, Option(min=1)] = 1200
    batch_size: Annotated[int, Option(min=1, help="Windows per step.")] = 16
    sequence_length: Annotated[int, Option(min=2, help="Tokens per window.")] = 256
    hidden_size: Annotated[int, Option(help="A multiple of 64.")] = 192
    num_layers: Annotated[int, Option(min=1)] = 20
    intermediate_size: Annotated[int, Option(min=1)] = 512
    vocab_size: Annotated[int, Option(min=257)] = 4096
    context: Annotated[int, Option(help="Declared context length in tokens.")] = 4096
    init_from: Annotated[Path | None, Option(help="Go on from this trained target.")] = None


@dataclass(frozen=True, kw_only=True)
class NewDrafterSettings:
    """What a new drafter of a target is like, before any training.

    Args:
        aux_layers: three layers of the target whose input states are read, 0 for the embedding; by default 0, 2L/3
            and L - 1.
        merge: how its KV cache is merged.
    """

    target: Annotated[Path, Option(help="Folder of a transformers causal LM; it is not changed.")]
    out: Annotated[Path, Option(help="Folder of the new drafter.")]
    draft_vocab_size: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Draft only the N most frequent tokens.", show_default="all tokens"),
    ] = None
    num_speculative_tokens: Annotated[int, Option(min=1, help="K, draft tokens a step; training unrolls as many.")] = 4
    intermediate_size: Annotated[int | None, Option(help="Of the MLP; the target's by default.")] = None
    aux_layers: list[int] | None = None
    lookup_length: Annotated[
        int, Option(help="In vLLM, copy what followed when this many last tokens stood there before; 0 = never.")
    ] = 4
    merge: MergeConfig = field(default_factory=lambda: MergeConfig(TRAINED_WINDOW))
    seed: Annotated[int, Option(help="Of the random weights.")] = 0


@dataclass(frozen=True, kw_only=True)
class DrafterSettings(LoopSettings, NewDrafterSettings):
    """The training of a drafter on data."""

    data: Annotated[
        list[Path],
        Option(
            metavar="PATH",
            help="Answers that `qm-spec data` wrote, conversations (JSON lines with messages), or text; repeatable.",
        ),
    ]
    drafter: Annotated[str, Option(help="quickmerge; eagle3 or eagle3-window to compare with.")] = "quickmerge"
    epochs: Annotated[float, Option(min=0, help="Times that the data is seen.")] = 2.0
    max_steps: Annotated[int, Option(min=0, help="Steps, in place of epochs.", show_default="as epochs need")] = 0
    batch_size: Annotated[
        int, Option("--rows-per-step", min=1, help="Positions of a step that the loss is taken at.")
    ] = 1024
    rows_per_document: Annotated[
        int | None,
        Option(min=1, help="Of them at most so many in one document, chosen anew each time.", show_default="all"),
    ] = None
    sequence_length: Annotated[int, Option(min=32, help="Tokens per window of text.")] = 1024
    regenerated_tokens: Annotated[
        int, Option(min=0, help="Tokens that the target writes behind passages of the text, as data.")
    ] = 0
    data_seed: Annotated[int | None, Option(help="Of the choice of documents.", show_default="seed")] = None
    init_from: Annotated[
        Path | None,
        Option(
            help="Go on from this trained drafter. Its draft vocabulary stays, unless --draft-vocab-size is given, too."
        ),
    ] = None
    states: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Keep what the target computes there: further epochs and drafters do not run it (4.6 KB per token "
            "and 576 units of width).",
        ),
    ] = None
    device_map: Annotated[str | None, Option(help="Of the target over several GPUs, e.g. auto; see transformers.")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class CompressorSettings(LoopSettings):
    """A compressor of a target's states."""

    data: Annotated[list[Path], Option(help="Text file or folder; may be repeated.")]
    out: Annotated[Path, Option(help="Folder of the new compressor.")]
    target: Annotated[
        Path, Option(help="Folder of a transformers causal LM; it is not changed.", show_default="the shipped one")
    ] = NOVELS / "target"
    layer: Annotated[int, Option(min=0, help="Whose states are compressed; 0 = the embeddings.")] = 5
    keep: Annotated[int, Option(min=1, help="K, tokens kept of each window or chunk.")] = 32
    chunk_size: Annotated[int | None, Option(min=1, help="Keep K tokens of every so many.")] = None
    grouping: Annotated[str, Option(help="cosine or kmeans.")] = "cosine"
    saliency: Annotated[str, Option(help="learned, entropy, inverse_entropy or norm.")] = "learned"
    causal: Annotated[bool, Option(help="No merged token holds a token later than its place.")] = False
    prior_layers: Annotated[int, Option(min=1, help="Layers of the prior.")] = 2
    gamma: Annotated[float, Option(min=0, max=1, help="Strictness of the fidelity; 1 counts every error.")] = 0.8
    alpha: Annotated[float, Option(min=0, help="Weight of the alignment loss.")] = 0.1
    start_temperature: Annotated[float, Option(help="Of the selection, at the first step.")] = 1.0
    temperature: Annotated[float, Option(help="After three quarters of the steps, and from then on.")] = 0.1
    max_steps: Annotated[int, Option(min=1)] = 600
    sequence_length: Annotated[int, Option(min=2, help="Tokens per window.")] = 256
    adam_lr: Annotated[float, Option(help="AdamW step of everything else.")] = 1e-3
