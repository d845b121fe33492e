"""The reference target: a small deep Llama with its own byte-level BPE, trained on a folder of text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from qm_spec import provenance
from qm_spec.training.data import TokenWindows, find_files, read_documents, sha256_of, tokenize
from qm_spec.training.fit import explained_full_disk, fit
from qm_spec.training.settings import TargetSettings

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(files: Sequence[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` entries, the end-of-text token (id 0) included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def target_config(
    vocab_size: int, hidden_size: int, num_layers: int, intermediate_size: int, context: int
) -> LlamaConfig:
    """Return a Llama config with heads of 64, one key/value head for three query heads or fewer, tied ends.

    Raises:
        ValueError: the hidden size is not a multiple of 64.
    """
    if hidden_size % 64:
        raise ValueError(f"train-target: hidden size must be a multiple of 64, got {hidden_size}")
    heads = hidden_size // 64
    groups = max(1, heads // 3) if heads % max(1, heads // 3) == 0 else heads
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_target(settings: TargetSettings) -> dict[str, Any]:
    """Train a causal LM and save it in bf16 under `out`; return this stage's provenance.

    Checkpoints are kept in `out/checkpoints`. 64 windows of the validation text are measured.

    Raises:
        FileNotFoundError: data or `init_from` is missing.
        ValueError: sizes that do not fit together.
    """
    if settings.init_from is not None and not (settings.init_from / "config.json").is_file():
        raise FileNotFoundError(f"train-target: {settings.init_from} holds no config.json")
    started, commit = time.time(), provenance.git_commit()
    set_seed(settings.seed)
    files, valid_files = find_files(settings.data), find_files(settings.valid)
    model: PreTrainedModel
    if settings.init_from is not None:
        tokenizer = AutoTokenizer.from_pretrained(settings.init_from)
        model = AutoModelForCausalLM.from_pretrained(settings.init_from, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(files, settings.vocab_size)
        model = LlamaForCausalLM(
            target_config(
                len(tokenizer), settings.hidden_size, settings.num_layers, settings.intermediate_size, settings.context
            )
        )
    settings.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(settings.out)
    train_set = TokenWindows(tokenize(tokenizer, read_documents(files)), settings.sequence_length)
    valid_ids = tokenize(tokenizer, read_documents(valid_files))
    # Every novel of the validation set is heard: the windows are taken at equal distances.
    valid_set = TokenWindows(valid_ids, settings.sequence_length)
    num_valid = max(1, 16384 // settings.sequence_length)
    valid_set.token_ids = valid_set.token_ids[:: max(1, len(valid_set) // num_valid)][:num_valid]
    metrics = fit(model, train_set, valid_set, settings, settings.out / "checkpoints", "target")
    with explained_full_disk(settings.out):
        model.to(torch.bfloat16).save_pretrained(settings.out)
    stage = {
        "command": provenance.command(),
        "commit": commit,
        "data_sha256": sha256_of(files),
        "valid_sha256": sha256_of(valid_files),
        "seed": settings.seed,
        "steps": settings.max_steps,
        "tokens": settings.max_steps * settings.batch_size * settings.sequence_length,
        "sequence_length": settings.sequence_length,
        "valid_loss_nats_per_token": metrics["eval_loss"],
        # Of one run from its beginning to its end; a resumed one has no single time.
        "wall_hours": None if settings.resume else round((time.time() - started) / 3600, 2),
        "versions": provenance.versions(),
    }
    provenance.write_stage(settings.out, stage, settings.init_from)
    return stage
