"""Training of a drafter against a frozen target, under the masks of inference."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction

from qm_spec import provenance
from qm_spec.config import MergeConfig
from qm_spec.data.answers import find_answer_files, read_answers
from qm_spec.data.conversations import read_conversations
from qm_spec.data.kind import data_kind
from qm_spec.discovery import target_fingerprint
from qm_spec.drafter.anchors import Drafter, columns_of, engine_steps
from qm_spec.drafter.checkpoint import load_drafter
from qm_spec.drafter.eagle3 import Eagle3Config, Eagle3Drafter
from qm_spec.drafter.head import draft_head
from qm_spec.drafter.losses import distillation_loss
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.drafter.vocabulary import choose_tokens, coverage
from qm_spec.training.data import find_files, read_documents, sha256_of, tokenize
from qm_spec.training.documents import Document, DocumentBatches, windows
from qm_spec.training.estimate import expected_acceptance_length
from qm_spec.training.fit import explained_full_disk, fit
from qm_spec.training.regenerate import regenerate
from qm_spec.training.settings import DrafterSettings, NewDrafterSettings
from qm_spec.training.states import Reading, TargetStates

_logger = logging.getLogger(__name__)

# Later draft steps count less: they matter only when the earlier tokens were accepted.
STEP_DISCOUNT = 0.8
# Tokens of one passage that the target writes, its prompt included.
PASSAGE_LENGTH = 512
# Documents that acceptance is measured on.
VALID_DOCUMENTS = 64
# Rows of the data that are named when they cannot be used; the rest is counted.
_SHOWN_SKIPS = 5
DRAFTERS = ("quickmerge", "eagle3", "eagle3-window")
# First tokens that EAGLE-3 with a window keeps, as in StreamingLLM (Xiao et al. 2023, arXiv 2309.17453).
ATTENTION_SINKS = 4
# EAGLE-3's MLP is a multiple of this: rows of 16 bytes in bfloat16, and within 2 % of any number of parameters.
MLP_MULTIPLE = 8
# Elements that heads are smaller by where a page of ours must fit, with its merge state, into one of the target's: 4
# make room in bfloat16, 2 in float32.
STATE_ROOM = 8
# Targets of which vLLM, when it serves them, hands out no state in front of layer 0 (vllm_plugin/aux_states.py).
WITHOUT_LAYER_0 = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa")


def default_aux_layers(num_layers: int, model_type: str | None = None) -> list[int]:
    """Return three target layers whose input states a drafter reads: the embedding (0), a late and the last.

    Args:
        num_layers: of the target.
        model_type: of the target's config; of families whose embedding vLLM does not hand out layer 1 is read.

    Raises:
        ValueError: the target has fewer than four layers.
    """
    if num_layers < 4:
        raise ValueError(f"train: the target needs at least 4 layers to read states from, got {num_layers}")
    return [int(model_type in WITHOUT_LAYER_0), 2 * num_layers // 3, num_layers - 1]


def _layer_sizes(target: PreTrainedModel) -> Any:
    """Return the target's configuration, where its layers differ (Gemma 4) as its last layer has it.

    That one attends to all tokens, and a page of the drafter's is to fit into its.
    """
    config = target.config
    return config.per_layer_config[-1] if getattr(config, "is_heterogeneous", False) else config


def _mlp_size(target: PreTrainedModel) -> int:
    """Return the width of the target's MLP; of experts alone (Qwen3.5-MoE), of those that a token goes through."""
    sizes = _layer_sizes(target)
    width = getattr(sizes, "intermediate_size", None) or sizes.num_experts_per_tok * sizes.moe_intermediate_size
    return int(width)


def _sizes(target: PreTrainedModel, num_speculative_tokens: int, fingerprint: str) -> dict[str, Any]:
    """Return what the configurations of all drafters of `target` share."""
    sizes = _layer_sizes(target)
    head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    if heads < 6 and head_dim % 64 == 0:
        # Few heads cannot look both near and far: halve them.
        heads, groups, head_dim = 2 * heads, 2 * groups, head_dim // 2
    return {
        "target_fingerprint": fingerprint,
        "eagle_aux_hidden_state_layer_ids": default_aux_layers(sizes.num_hidden_layers, sizes.model_type),
        "num_speculative_tokens": num_speculative_tokens,
        "vocab_size": target.get_output_embeddings().weight.shape[0],
        "hidden_size": sizes.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        # A target with another kind of norm may state none.
        "rms_norm_eps": getattr(sizes, "rms_norm_eps", None) or 1e-6,
        "bos_token_id": sizes.bos_token_id,
        "eos_token_id": sizes.eos_token_id,
    }


def drafter_config(
    target: PreTrainedModel,
    fingerprint: str,
    merge: MergeConfig,
    num_speculative_tokens: int,
    intermediate_size: int | None = None,
    aux_layers: Sequence[int] | None = None,
    lookup_length: int = 0,
    draft_vocab_size: int | None = None,
) -> QuickMergeConfig:
    """Return the configuration of a drafter that fits `target`.

    Args:
        target: its sizes and head layout are taken over, with smaller heads where its layers are of several kinds, so
            that vLLM keeps their groups (docs/design.md, Page).
        fingerprint: of the target.
        merge: the merging schedule.
        num_speculative_tokens: the depth to unroll in training and to draft by default.
        intermediate_size: of the MLP; the target's when None.
        aux_layers: three target layers whose input states it reads, 0 for the embedding; those of
            `default_aux_layers` when None.
        lookup_length: see `QuickMergeConfig`.
        draft_vocab_size: see `QuickMergeConfig`.

    Raises:
        ValueError: the layers are not three of the target's, or the lookup length is out of range.
    """
    sizes = _sizes(target, num_speculative_tokens, fingerprint)
    if aux_layers is not None:
        num_layers = target.config.num_hidden_layers
        if len(set(aux_layers)) != 3 or not all(0 <= layer < num_layers for layer in aux_layers):
            raise ValueError(f"train: aux layers must be three different ones in 0..{num_layers - 1}, got {aux_layers}")
        sizes["eagle_aux_hidden_state_layer_ids"] = list(aux_layers)
    if len(set(getattr(target.config, "layer_types", None) or ())) > 1 and sizes["head_dim"] > STATE_ROOM:
        sizes["head_dim"] -= STATE_ROOM
    return QuickMergeConfig(
        **sizes,
        norm_aux_states=True,
        next_token_values=True,
        lookup_length=lookup_length,
        draft_vocab_size=draft_vocab_size,
        quickmerge=merge.to_dict(),
        intermediate_size=intermediate_size or _mlp_size(target),
    )


def config_of(settings: NewDrafterSettings, target: PreTrainedModel, fingerprint: str) -> QuickMergeConfig:
    """Return the configuration of the drafter that settings ask for, see `drafter_config`."""
    return drafter_config(
        target,
        fingerprint,
        settings.merge,
        settings.num_speculative_tokens,
        settings.intermediate_size,
        settings.aux_layers,
        settings.lookup_length,
        settings.draft_vocab_size,
    )


def num_parameters(drafter: type[PreTrainedModel], config: LlamaConfig) -> int:
    """Count the weights of a drafter that are trained, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in drafter(config).parameters() if parameter.requires_grad)


def eagle3_config(
    target: PreTrainedModel, prior: QuickMergeConfig, sliding_window: int | None = None, attention_sinks: int = 0
) -> Eagle3Config:
    """Return the configuration of an EAGLE-3 drafter with as many parameters as `prior`.

    The head layout, and so the bytes of a key and a value, is the prior's, and so are the layers it reads and
    whether they are normed; the MLP takes up the difference. The rotary base is the target's, without its scaling.

    Args:
        target: both drafters are its own.
        prior: the drafter to compare with.
        sliding_window: see `Eagle3Config`.
        attention_sinks: see `Eagle3Config`.
    """
    rotary = getattr(target.config, "rope_parameters", None) or {}

    def sized(intermediate_size: int) -> Eagle3Config:
        return Eagle3Config(
            **{
                **_sizes(target, prior.num_speculative_tokens, prior.target_fingerprint),
                "eagle_aux_hidden_state_layer_ids": prior.eagle_aux_hidden_state_layer_ids,
            },
            fc_norm=prior.norm_aux_states,
            draft_vocab_size=prior.draft_vocab_size,
            sliding_window=sliding_window,
            attention_sinks=attention_sinks,
            intermediate_size=intermediate_size,
            max_position_embeddings=target.config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": rotary.get("rope_theta", 10000.0)},
        )

    difference = num_parameters(QuickMergePrior, prior) - num_parameters(Eagle3Drafter, sized(MLP_MULTIPLE))
    # Three matrices of the MLP, each of one row or column per unit.
    steps = round(difference / (3 * prior.hidden_size * MLP_MULTIPLE))
    return sized((1 + max(0, steps)) * MLP_MULTIPLE)


def new_drafter(
    kind: str, target: PreTrainedModel, prior: QuickMergeConfig, sequence_length: int
) -> QuickMergePrior | Eagle3Drafter:
    """Return an untrained drafter.

    Args:
        kind: one of `DRAFTERS`.
        target: of the drafter.
        prior: our drafter's configuration; an EAGLE-3 drafter has as many parameters, and with a window and
            sinks it attends to as many entries after `sequence_length` tokens.
        sequence_length: tokens.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind == "quickmerge":
        return QuickMergePrior(prior)
    if kind == "eagle3":
        return Eagle3Drafter(eagle3_config(target, prior))
    if kind == "eagle3-window":
        window = prior.merge.entries_attended(sequence_length) - ATTENTION_SINKS
        return Eagle3Drafter(eagle3_config(target, prior, window, ATTENTION_SINKS))
    raise ValueError(f"train: the drafter must be one of {DRAFTERS}, got {kind!r}")


class DraftTraining(nn.Module):
    """A drafter beside its frozen target: one call unrolls K draft steps at many rows.

    Keys and values of verified tokens need no other row of the drafter, in our prior as in EAGLE-3: the loss is
    taken at any positions, each against the memory that inference would hold there.

    Args:
        drafter: trained.
        target: frozen, any causal LM of transformers that returns its hidden states.
        states: reads the target; nothing is kept when None.
    """

    def __init__(self, drafter: Drafter, target: PreTrainedModel, states: TargetStates | None = None) -> None:
        super().__init__()
        self.drafter = drafter
        target.requires_grad_(False).eval()
        # In a tuple they are no submodules: checkpoints hold what is trained and nothing else.
        self._target = (target,)
        self._states = states or TargetStates(target)
        self._head = draft_head(drafter, target)
        # A target in 16 bits has a drafter that runs in 16 bits.
        dtype = target.get_output_embeddings().weight.dtype
        self._reduced = None if dtype == torch.float32 else dtype

    @property
    def target(self) -> PreTrainedModel:
        """The frozen target."""
        return self._target[0]

    def read_target(self, input_ids: Tensor, lengths: Tensor | None = None) -> Reading:
        """Return what the target says about documents `[B, N]`."""
        return self._states.read(input_ids, self.drafter.config.eagle_aux_hidden_state_layer_ids, lengths)

    def unroll(self, aux_states: Tensor, input_ids: Tensor, rows: Tensor) -> list[Tensor]:
        """Return the draft logits of each of the K draft steps, fed with the text's own tokens.

        Args:
            aux_states: `[B, N, 3 D]`.
            input_ids: `[B, N]`.
            rows: `[B, T]` int64, positions t; behind the text's end its last token is fed.

        Returns:
            K times `[B, T, Vd]`; that of step j predicts token t + 2 + j.
        """
        embeddings = self._embeddings(input_ids)
        drafts = self.drafter.read(aux_states, embeddings).anchors(rows)
        steps = self.drafter.config.num_speculative_tokens
        return [self._head.logits(drafts.step(_following(embeddings, rows + 1 + step))) for step in range(steps)]

    def _embeddings(self, input_ids: Tensor) -> Tensor:
        return self.target.get_input_embeddings()(input_ids).float()

    def forward(
        self, input_ids: Tensor, rows: Tensor, labels: Tensor, lengths: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `loss` and `accepted` `[B, T]`, the draft tokens that greedy verification accepts at each row.

        A row is unrolled as far as its drafts agree with the target: what an engine would reject behind the first
        wrong one teaches nothing that is ever used.

        Args:
            input_ids: `[B, N]` int64, padded on the right.
            rows: `[B, T]` int64, positions to draft from, -1 for padding, whose `accepted` is -1.
            labels: `[B, N]`, not 0 for the tokens to be learned; what is learned is the target's distribution there.
            lengths: `[B]`, tokens of each document; N for all when None.
        """
        present, rows = rows >= 0, rows.clamp_min(0)
        accepted = torch.zeros_like(rows).masked_fill(~present, -1)
        columns = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        reading = self.read_target(input_ids, lengths)
        steps = self.drafter.config.num_speculative_tokens
        # Where the token behind is to be learned; behind the last one there is none.
        to_learn = F.pad(labels[:, 1:] != 0, (0, 1))
        # The target's distribution once for each place that any row may ask for.
        needed = torch.zeros_like(to_learn)
        for step in range(steps):
            needed |= _marked(to_learn, rows + 1 + step, present)
        needed &= to_learn
        number = needed.flatten().cumsum(0).view_as(needed) - 1
        log_probs, best = self._expected(reading, needed)

        loss, weight = reading.aux_states.new_zeros(()), 0.0
        with torch.autocast(input_ids.device.type, self._reduced or torch.bfloat16, self._reduced is not None):
            embeddings = self._embeddings(input_ids)
            drafts = self.drafter.read(reading.aux_states, embeddings).anchors(rows)
            for step in range(steps):
                output = drafts.step(_following(embeddings, rows + 1 + step))
                places = (rows + 1 + step).clamp_max(input_ids.shape[1] - 1)
                asked = present & to_learn.gather(1, places)
                chosen = number.gather(1, places)[asked]
                draft = self._head.logits(output[asked])
                loss = loss + STEP_DISCOUNT**step * distillation_loss(draft, log_probs[chosen])
                weight += STEP_DISCOUNT**step * len(chosen)
                right = torch.zeros_like(asked)
                right[asked] = draft.argmax(-1) == best[chosen]
                accepted.scatter_add_(1, columns, right.long())
                kept, present = _packed(right)
                if not kept.shape[1]:
                    break
                drafts.keep(kept)
                rows, columns = rows.gather(1, kept), columns.gather(1, kept)
        return {"loss": loss / max(weight, 1.0), "accepted": accepted}

    def _expected(self, reading: Reading, needed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target's log-probabilities over the draft vocabulary, float32 `[n, Vd]`, and its best token's row.

        The row is -1 where the draft vocabulary misses that token. In training it is the best of those it has.
        """
        token_ids = self.drafter.draft_token_ids
        if token_ids is not None and not self.training:
            logits = reading.logits(needed)
            row_of = token_ids.new_full((logits.shape[-1],), -1)
            row_of[token_ids] = torch.arange(len(token_ids), device=row_of.device)
            best, logits = row_of[logits.argmax(-1)], logits[:, token_ids]
        else:
            weight = None if token_ids is None else self.target.get_output_embeddings().weight[token_ids]
            logits = reading.logits(needed, weight)
            best = logits.argmax(-1)
        return torch.log_softmax(logits, -1, dtype=torch.float32), best


def _following(embeddings: Tensor, places: Tensor) -> Tensor:
    """Return the embeddings `[B, T, D]` of the tokens at `places` `[B, T]`; behind the end the last one's."""
    return columns_of(embeddings, places.clamp_max(embeddings.shape[1] - 1))


def _packed(where: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns where a mask `[B, T]` is set, at the front of `[B, T']`, and which of these are real."""
    counts = where.sum(1)
    columns = where.int().argsort(stable=True, dim=1, descending=True)[:, : int(counts.max())]
    return columns, torch.arange(columns.shape[1], device=where.device) < counts.unsqueeze(1)


def _marked(like: Tensor, places: Tensor, where: Tensor) -> Tensor:
    """Return a mask `[B, N]` with the places `[B, T]` set where `where` `[B, T]` is; places behind the end are none."""
    where = where & (places < like.shape[1])
    batch = torch.arange(len(places), device=places.device).unsqueeze(1).expand_as(places)
    marked = torch.zeros_like(like)
    marked[batch[where], places[where]] = True
    return marked


def _acceptance(prediction: EvalPrediction) -> dict[str, float]:
    """Return the acceptance length of an engine that decodes the validation documents from their first row on."""
    steps = [step for row in prediction.predictions for step in engine_steps(row[row >= 0])]
    return {"acceptance_length": 1 + float(np.mean(steps))}


def _mixed(text: list[Document], written: list[Document], seed: int) -> list[Document]:
    """Return the target's own text with a third as much of what people wrote, all of it where the target wrote none."""
    chosen = np.random.default_rng(seed).permutation(len(text))
    return [*written, *(text[number] for number in chosen[: len(written) // 3 if written else len(text)])]


def _read(
    data: Sequence[Path], tokenizer: PreTrainedTokenizerBase, vocab_size: int, fingerprint: str, max_tokens: int | None
) -> tuple[list[Document], np.ndarray, list[Path]]:
    """Return the answered conversations of `data`, the token ids of its text, and the files that were read."""
    paths: dict[str, list[Path]] = {"answers": [], "conversations": [], "text": []}
    for path in data:
        paths[data_kind(path)].append(path)
    skipped: list[str] = []
    documents = [
        Document.answered(one.prompt_token_ids, one.output_token_ids)
        for one in read_answers(
            paths["answers"], vocab_size=vocab_size, fingerprint=fingerprint, on_skip=skipped.append
        )
    ]
    if paths["conversations"]:
        documents += [
            Document(np.asarray(one.token_ids, dtype=np.int32), np.asarray(one.answer_mask, dtype=bool))
            for one in read_conversations(
                paths["conversations"], tokenizer, max_tokens=max_tokens, on_skip=skipped.append
            )
        ]
    for line in skipped[:_SHOWN_SKIPS]:
        _logger.warning("left out: %s", line)
    if len(skipped) > _SHOWN_SKIPS:
        _logger.warning("left out: %d rows in all", len(skipped))
    files = find_files(paths["text"]) if paths["text"] else []
    text = tokenize(tokenizer, read_documents(files)) if files else np.empty(0, np.int32)
    answers = find_answer_files(paths["answers"]) if paths["answers"] else []
    return documents, text, [*answers, *paths["conversations"], *files]


def token_counts(documents: Sequence[Document], vocab_size: int) -> Tensor:
    """Count how often each token is to be learned: `[V]` int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for document in documents:
        counts += np.bincount(document.token_ids[document.learned], minlength=vocab_size)[:vocab_size]
    return torch.from_numpy(counts)


def give_draft_vocabulary(
    drafter: QuickMergePrior | Eagle3Drafter, target: PreTrainedModel, counts: Tensor, required: Iterable[int]
) -> float:
    """Choose the tokens that a drafter can propose, if not all, and return the share of the written ones.

    Args:
        drafter: changed in place.
        target: whose vocabulary head EAGLE-3 takes rows of.
        counts: `[V]`, see `token_counts`.
        required: ids that must be among them.
    """
    if drafter.draft_token_ids is None:
        return 1.0
    token_ids = choose_tokens(counts, drafter.config.draft_vocab_size, required)
    drafter.draft_token_ids = token_ids
    if isinstance(drafter, Eagle3Drafter):
        assert drafter.lm_head is not None
        # The target is not frozen yet.
        head = target.get_output_embeddings().weight.detach()
        drafter.lm_head.weight.copy_(head[token_ids.to(head.device)])
    return coverage(counts, token_ids)


def _ends(tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel) -> set[int]:
    """Return the ids that end a text or an answer."""
    named = getattr(target.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return {token_id for token_id in ends if token_id is not None}


def train_drafter(settings: DrafterSettings) -> dict[str, Any]:
    """Train a drafter, save it under `out`, return this stage's provenance.

    The target is used in its own dtype. A fiftieth of the data is kept for validation. Checkpoints, the log and
    regenerated text are kept in `out/work`. A drafter to go on from keeps its sizes and settings.

    Raises:
        FileNotFoundError: target or data missing.
        ValueError: an unknown drafter, sizes that do not fit (those of `init_from` too), too little data, data of
            another target.
    """
    started, commit = time.time(), provenance.git_commit()
    set_seed(settings.seed)
    data_seed = settings.seed if settings.data_seed is None else settings.data_seed
    fingerprint = target_fingerprint(settings.target)
    tokenizer = AutoTokenizer.from_pretrained(settings.target)
    target = AutoModelForCausalLM.from_pretrained(settings.target, dtype="auto", device_map=settings.device_map)
    if settings.device_map is None:
        # With several processes, this one's GPU.
        target.to(PartialState().device)
    config = config_of(settings, target, fingerprint)
    drafter = new_drafter(settings.drafter, target, config, settings.sequence_length)
    if settings.init_from is not None:
        drafter = _known_drafter(settings.init_from, drafter, fingerprint, settings.target)
        if settings.draft_vocab_size not in (None, drafter.config.draft_vocab_size):
            raise ValueError(
                f"train: {settings.init_from} has a draft vocabulary of {drafter.config.draft_vocab_size or 'all'} "
                f"tokens, not {settings.draft_vocab_size}; leave --draft-vocab-size out to keep them, or pass their "
                "number to choose anew"
            )
    vocab_size = target.get_output_embeddings().weight.shape[0]
    limit = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    answered, text, files = _read(settings.data, tokenizer, vocab_size, fingerprint, limit)
    work = settings.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    weights = sha256_of(sorted(settings.target.glob("*.safetensors")))
    shared = None if settings.states is None else settings.states / weights[:16]
    states = TargetStates(target, shared)
    train_text, valid_text, written = _split_text(text, settings.sequence_length)
    if settings.regenerated_tokens:
        passage = min(PASSAGE_LENGTH, settings.sequence_length)
        prompts = np.concatenate([document.token_ids for document in train_text])
        passages = regenerate(target, prompts, passage, settings.regenerated_tokens, shared or work, data_seed)
        # Passages are packed: the time to write one grows with the square of its length.
        written = windows(passages.reshape(-1), settings.sequence_length)
    # Validation is on what drafters meet in service where there is any: the target's own text.
    own = [*answered, *written]
    order = np.random.default_rng(data_seed).permutation(len(own))
    num_valid = min(VALID_DOCUMENTS, len(own) // 10)
    valid = [own[number] for number in order[:num_valid]] or valid_text[:VALID_DOCUMENTS]
    documents = _mixed(train_text, [own[number] for number in order[num_valid:]], data_seed)
    if settings.init_from is None or settings.draft_vocab_size is not None:
        counts = token_counts(documents, vocab_size)
        share = give_draft_vocabulary(drafter, target, counts, _ends(tokenizer, target))
        if drafter.draft_token_ids is not None:
            _logger.info(
                "draft vocabulary: %d tokens, %.1f %% of those written",
                drafter.config.draft_vocab_size,
                100 * share,
            )
    train_set = DocumentBatches(documents, settings.batch_size, settings.rows_per_document, data_seed)
    valid_set = DocumentBatches(valid, settings.batch_size)
    settings = settings.fitted(len(train_set))
    model = DraftTraining(drafter, target, states)
    _logger.info(
        "%d documents of %d tokens, %d of them to learn; %d steps of %d rows",
        len(documents),
        sum(len(document.token_ids) for document in documents),
        train_set.num_rows,
        settings.max_steps,
        settings.batch_size,
    )
    if settings.init_from is None:
        _logger.info(
            "expect about %.1f tokens per step: SmolLM2-135M-Instruct's drafter reached that with as many rows",
            expected_acceptance_length(round(settings.max_steps * train_set.num_rows / len(train_set))),
        )
    if shared is not None:
        layers = drafter.config.eagle_aux_hidden_state_layer_ids
        keep_states(states, [*train_set.documents, *valid_set.documents], layers)
    rows_per_step = train_set.num_rows / len(train_set)
    metrics = fit(
        model,
        train_set,
        valid_set,
        settings,
        work / "checkpoints",
        "drafter",
        _acceptance,
        whole_batches=True,
        tokens_per_step=rows_per_step,
    )
    with explained_full_disk(settings.out):
        drafter.to(torch.bfloat16).save_pretrained(settings.out)
    stage = {
        "command": provenance.command(),
        "commit": commit,
        "drafter": settings.drafter,
        "parameters": sum(parameter.numel() for parameter in drafter.parameters() if parameter.requires_grad),
        "target_fingerprint": fingerprint,
        "data_sha256": sha256_of(files),
        "documents": len(documents),
        "learned_tokens": train_set.num_rows,
        "regenerated_tokens": sum(len(document.token_ids) for document in written),
        "draft_vocab_size": drafter.config.draft_vocab_size,
        "seed": settings.seed,
        "data_seed": data_seed,
        "steps": settings.max_steps,
        "rows_per_step": settings.batch_size,
        "rows": round(settings.max_steps * rows_per_step),
        "valid_documents": len(valid_set.documents),
        "valid_loss": metrics["eval_loss"],
        "valid_acceptance_length": metrics["eval_acceptance_length"],
        # Of one run from its beginning to its end; a resumed one has no single time.
        "wall_hours": None if settings.resume else round((time.time() - started) / 3600, 2),
        "versions": provenance.versions(),
    }
    provenance.write_stage(settings.out, stage, settings.init_from)
    shutil.rmtree(work / "checkpoints")
    return stage


def _known_drafter(
    folder: Path, new: QuickMergePrior | Eagle3Drafter, fingerprint: str, target_dir: Path
) -> QuickMergePrior | Eagle3Drafter:
    """Load a drafter to go on from, which must be of the new one's kind and of the same target."""
    known = load_drafter(folder)
    if known.config.architectures != new.config.architectures:
        raise ValueError(
            f"train: {folder} holds a {known.config.architectures[0]}, and the drafter asked for is a "
            f"{new.config.architectures[0]}; leave --init-from out"
        )
    if known.config.target_fingerprint != fingerprint:
        raise ValueError(
            f"train: {folder} was trained for the target {known.config.target_fingerprint}, "
            f"and {target_dir} is {fingerprint}; leave --init-from out"
        )
    return known


def _split_text(text: np.ndarray, length: int) -> tuple[list[Document], list[Document], list[Document]]:
    """Return documents of a text to train on and of its last fiftieth, and an empty list for what the target writes."""
    if not len(text):
        return [], [], []
    num_valid = max(length, len(text) // 50)
    return windows(text[:-num_valid], length), windows(text[-num_valid:], length), []


def keep_states(states: TargetStates, documents: Sequence[Document], layers: Sequence[int]) -> None:
    """Read documents that are not kept yet, with a bar that says how long it takes."""
    total = sum(len(document.token_ids) for document in documents)
    with Progress(
        TextColumn("the target reads"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=Console()
    ) as progress:
        task = progress.add_task("states", total=total)
        states.keep(documents, layers, lambda number: progress.advance(task, number))
