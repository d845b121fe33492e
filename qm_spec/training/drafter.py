"""Training of the prior against a frozen target, under the masks of inference."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.trainer_utils import EvalPrediction

from qm_spec import provenance
from qm_spec.config import MergeConfig
from qm_spec.discovery import target_fingerprint
from qm_spec.drafter.config import QuickMergeConfig
from qm_spec.drafter.losses import AlignmentHeads, distillation_loss, fidelity_loss
from qm_spec.drafter.memory import Memory, merge_levels
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.ops.draft_attention import draft_attention
from qm_spec.training.data import TokenWindows, find_files, read_documents, sha256_of, tokenize
from qm_spec.training.loop import LoopSettings, fit
from qm_spec.training.regenerate import regenerate

# Later draft steps count less: they matter only when the earlier tokens were accepted.
STEP_DISCOUNT = 0.8
ALIGNMENT_WEIGHT = 0.1
FIDELITY_WEIGHT = 0.1
# Tokens of one passage that the target writes, its prompt included.
PASSAGE_LENGTH = 512
VALID_WINDOWS = 16


def default_aux_layers(num_layers: int) -> list[int]:
    """Return three target layers whose input states the prior reads: an early, a middle and the last.

    Raises:
        ValueError: the target has fewer than four layers.
    """
    if num_layers < 4:
        raise ValueError(f"train: the target needs at least 4 layers to read states from, got {num_layers}")
    return [max(1, num_layers // 3), 2 * num_layers // 3, num_layers - 1]


def drafter_config(
    target: PreTrainedModel,
    fingerprint: str,
    merge: MergeConfig,
    num_speculative_tokens: int,
    intermediate_size: int | None = None,
) -> QuickMergeConfig:
    """Return the configuration of a drafter that fits `target`.

    Args:
        target: its sizes and head layout are taken over.
        fingerprint: of the target.
        merge: the merging schedule.
        num_speculative_tokens: the depth to unroll in training and to draft by default.
        intermediate_size: of the MLP; the target's when None.
    """
    sizes = target.config
    head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    if heads < 6 and head_dim % 64 == 0:
        # Few heads cannot look both near and far: halve them.
        heads, groups, head_dim = 2 * heads, 2 * groups, head_dim // 2
    return QuickMergeConfig(
        target_fingerprint=fingerprint,
        eagle_aux_hidden_state_layer_ids=default_aux_layers(sizes.num_hidden_layers),
        num_speculative_tokens=num_speculative_tokens,
        quickmerge=merge.to_dict(),
        vocab_size=target.get_output_embeddings().weight.shape[0],
        hidden_size=sizes.hidden_size,
        intermediate_size=intermediate_size or sizes.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=getattr(sizes, "rms_norm_eps", 1e-6),
        bos_token_id=sizes.bos_token_id,
        eos_token_id=sizes.eos_token_id,
    )


class DraftTraining(nn.Module):
    """The prior beside its frozen target: one call unrolls K draft steps at sampled rows.

    Keys and values depend on the target's states alone, so a row needs no other row of the prior:
    the loss is taken at a random subset of positions, each against the memory that inference would
    hold there.

    Args:
        prior: trained.
        target: frozen, any causal LM of transformers that returns its hidden states.
        rows_per_window: positions per window that the loss is taken at.
    """

    def __init__(self, prior: QuickMergePrior, target: PreTrainedModel, rows_per_window: int) -> None:
        super().__init__()
        self.prior = prior
        config = prior.config
        self.alignment = AlignmentHeads(config.num_key_value_heads * config.head_dim)
        self.rows_per_window = rows_per_window
        target.requires_grad_(False).eval()
        # In a tuple it is no submodule: checkpoints hold what is trained and nothing else.
        self._target = (target,)

    @property
    def target(self) -> PreTrainedModel:
        """The frozen target."""
        return self._target[0]

    @torch.no_grad()
    def read_target(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target's auxiliary states `[B, N, 3 D]` and logits `[B, N, V]`."""
        out = self.target(input_ids=input_ids, output_hidden_states=True, use_cache=False)
        layers = self.prior.config.eagle_aux_hidden_state_layer_ids
        return torch.cat([out.hidden_states[layer] for layer in layers], -1).float(), out.logits

    def unroll(self, aux_states: Tensor, input_ids: Tensor, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run all draft steps at the given positions, fed with the text's own tokens.

        Args:
            aux_states: `[B, N, 3 D]`.
            input_ids: `[B, N]`.
            rows: `[B, T]` int64, positions t; t + K must lie below N.

        Returns:
            K tensors of draft logits `[B, T, V]` (step j predicts token t + 2 + j), and the loss of
            merging: alignment and fidelity with their weights.
        """
        layer, config = self.prior.layer, self.prior.config
        embed, head = self.target.get_input_embeddings(), self.target.get_output_embeddings()
        fused = layer.fuse(aux_states)
        keys, values = (x.transpose(1, 2) for x in layer.keys_values(fused))
        levels = merge_levels(keys, values, config.merge)
        memory = Memory.build(keys, values, levels, config.merge)
        bias = memory.bias(rows, layer.slopes, layer.far_bias)
        raw_slopes = layer.slopes.view(-1, 1, 1) * memory.entries.raw[:, None, None]

        state = fused.gather(1, rows.unsqueeze(-1).expand(-1, -1, fused.shape[-1]))
        draft_keys = keys.new_zeros(*rows.shape, 0, layer.num_kv_heads, layer.head_dim)
        draft_values = draft_keys
        logits = []
        for step in range(config.num_speculative_tokens):
            if step > 0:
                own_key, own_value = layer.keys_values(state)
                draft_keys = torch.cat([draft_keys, own_key.unsqueeze(2)], 2)
                draft_values = torch.cat([draft_values, own_value.unsqueeze(2)], 2)
            query, residual = layer.query(embed(input_ids.gather(1, rows + 1 + step)).float(), state)
            attended = draft_attention(
                query,
                memory.entries.keys,
                memory.entries.values,
                bias - step * raw_slopes,
                draft_keys,
                draft_values,
                layer.slopes,
            )
            output, state = layer.finish(attended, residual)
            logits.append(head(output.to(head.weight.dtype)))
        # One merged token is the concatenation of its heads, which all have the same order of groups.
        tokens = levels[0].values.flatten(2, 3).transpose(1, 2).flatten(2)
        merging = ALIGNMENT_WEIGHT * self.alignment(tokens) + FIDELITY_WEIGHT * fidelity_loss(values, levels)
        return logits, merging

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return `loss` and `accepted` `[B, T]`, the drafted tokens that greedy verification would keep.

        Args:
            input_ids: `[B, N]` int64.
            labels: ignored; the target's distribution is the label.
        """
        steps = self.prior.config.num_speculative_tokens
        num_rows = input_ids.shape[1] - steps
        if self.training:
            picks = torch.rand(input_ids.shape[0], num_rows, device=input_ids.device)
            rows = picks.argsort(-1)[:, : self.rows_per_window]
        else:
            # Validation looks at the same, evenly spread rows each time.
            stride = max(1, num_rows // self.rows_per_window)
            rows = torch.arange(0, num_rows, stride, device=input_ids.device).expand(len(input_ids), -1)
        aux_states, target_logits = self.read_target(input_ids)
        logits, loss = self.unroll(aux_states, input_ids, rows)
        agreed = torch.ones_like(rows, dtype=torch.bool)
        accepted = torch.zeros_like(rows)
        weights = [STEP_DISCOUNT**step for step in range(steps)]
        for step, draft in enumerate(logits):
            index = (rows + 1 + step).unsqueeze(-1).expand(-1, -1, target_logits.shape[-1])
            expected = target_logits.gather(1, index)
            loss = loss + weights[step] / sum(weights) * distillation_loss(draft, expected)
            agreed = agreed & (draft.argmax(-1) == expected.argmax(-1))
            accepted = accepted + agreed
        return {"loss": loss, "accepted": accepted}


def _acceptance(prediction: EvalPrediction) -> dict[str, float]:
    return {"acceptance_length": 1 + float(np.mean(prediction.predictions))}


def _mix(text: np.ndarray, written: np.ndarray, needed: int, seed: int) -> np.ndarray:
    """Join up to 8 copies of the written windows, for three quarters of a run, with windows of the text."""
    rng = np.random.default_rng(seed)
    repeats = min(8, -(-3 * needed // (4 * len(written)))) if len(written) else 0
    copies = [written[rng.permutation(len(written))] for _ in range(repeats)]
    num_text = max(1, needed - repeats * len(written))
    return np.concatenate([*copies, text[rng.permutation(len(text))[:num_text]]])


def train_drafter(
    target_dir: Path,
    data: Sequence[Path],
    out: Path,
    *,
    loop: LoopSettings,
    merge: MergeConfig,
    num_speculative_tokens: int = 4,
    intermediate_size: int | None = None,
    sequence_length: int = 1024,
    rows_per_window: int = 128,
    regenerated_tokens: int = 0,
    init_from: Path | None = None,
    resume: bool = False,
) -> dict:
    """Train a drafter for the target in `target_dir`, save it under `out`, return this stage's provenance.

    Args:
        target_dir: folder of a transformers causal LM; frozen.
        data: text files or folders; the last 2 % of the tokens are kept for validation.
        out: folder of the drafter; checkpoints and regenerated text are kept in `out/work`.
        loop: see `LoopSettings`.
        merge: the merging schedule.
        num_speculative_tokens: draft steps unrolled, and the default K of the drafter.
        intermediate_size: of the prior's MLP; the target's when None.
        sequence_length: tokens per window.
        rows_per_window: positions per window that the loss is taken at.
        regenerated_tokens: tokens that the target itself writes, added to the data. Acceptance is
            measured on what the target writes, not on what people wrote.
        init_from: a trained drafter of this target to go on from; its sizes and settings are kept.
        resume: go on from the last checkpoint under `out`.

    Raises:
        FileNotFoundError: target or data missing.
        ValueError: sizes that do not fit, too little text.
    """
    started, commit = time.time(), provenance.git_commit()
    set_seed(loop.seed)
    fingerprint = target_fingerprint(target_dir)
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32)
    if torch.cuda.is_available():
        target.cuda()
    config = drafter_config(target, fingerprint, merge, num_speculative_tokens, intermediate_size)
    prior = (
        QuickMergePrior(config)
        if init_from is None
        else QuickMergePrior.from_pretrained(init_from, dtype=torch.float32)
    )
    if prior.config.target_fingerprint != fingerprint:
        raise ValueError(
            f"train: {init_from} was trained for the target {prior.config.target_fingerprint}, "
            f"and {target_dir} is {fingerprint}; leave --init-from out"
        )
    files = find_files(data)
    token_ids = tokenize(tokenizer, read_documents(files))
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    num_valid = max(sequence_length, len(token_ids) // 50)
    text, valid_text = token_ids[:-num_valid], token_ids[-num_valid:]
    written = np.empty((0, sequence_length), np.int32)
    if regenerated_tokens:
        passage = min(PASSAGE_LENGTH, sequence_length)
        passages = regenerate(target, text, passage, regenerated_tokens, work, loop.seed)
        # Passages are packed: the time to write one grows with the square of its length.
        written = TokenWindows(passages.reshape(-1), sequence_length).token_ids
    # Half of the validation is what drafters meet in service: the target's own text.
    held_out = min(VALID_WINDOWS // 2, len(written) // 10)
    valid_set = TokenWindows(valid_text, sequence_length)
    valid_set.token_ids = np.concatenate([valid_set.token_ids[: VALID_WINDOWS - held_out], written[:held_out]])
    train_set = TokenWindows(text, sequence_length)
    needed = loop.max_steps * loop.batch_size
    train_set.token_ids = _mix(train_set.token_ids, written[held_out:], needed, loop.seed)
    model = DraftTraining(prior, target, rows_per_window)
    metrics = fit(model, train_set, valid_set, loop, work / "checkpoints", "drafter", resume, _acceptance)
    prior.to(torch.bfloat16).save_pretrained(out)
    stage = {
        "command": provenance.command(),
        "commit": commit,
        "target_fingerprint": fingerprint,
        "data_sha256": sha256_of(files),
        "regenerated_tokens": int(written.size),
        "seed": loop.seed,
        "steps": loop.max_steps,
        "windows": loop.max_steps * loop.batch_size,
        "sequence_length": sequence_length,
        "rows_per_window": rows_per_window,
        "valid_loss": metrics["eval_loss"],
        "valid_acceptance_length_teacher_forced": metrics["eval_acceptance_length"],
        # Of one run from its beginning to its end; a resumed one has no single time.
        "wall_hours": None if resume else round((time.time() - started) / 3600, 2),
        "versions": provenance.versions(),
    }
    provenance.write_stage(out, stage, init_from)
    shutil.rmtree(work / "checkpoints")
    return stage
