"""A drafter with random weights: it costs what a trained one costs, and drafts nothing useful."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from qm_spec import provenance
from qm_spec.discovery import target_fingerprint
from qm_spec.discovery.fingerprint import end_token_ids
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.training.drafter import config_of, give_draft_vocabulary, num_parameters
from qm_spec.training.settings import NewDrafterSettings


def write_untrained(settings: NewDrafterSettings) -> dict[str, Any]:
    """Write the drafter that training would begin with under `out`, and return its provenance.

    Of the target config and tokenizer are read, no weights. Without data no token is more frequent than another: a
    draft vocabulary holds the lowest ids and those that end an answer.

    Raises:
        FileExistsError: `out` holds something.
        FileNotFoundError: the target has no config.json or no tokenizer.
        ValueError: sizes that do not fit the target.
    """
    if settings.out.exists() and (not settings.out.is_dir() or any(settings.out.iterdir())):
        raise FileExistsError(f"init: {settings.out} is there already and not empty; choose another --out")
    fingerprint = target_fingerprint(settings.target)
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings.target))
    config = config_of(settings, target, fingerprint)
    set_seed(settings.seed)
    drafter = QuickMergePrior(config)
    give_draft_vocabulary(
        drafter, target, torch.zeros(config.vocab_size, dtype=torch.int64), end_token_ids(settings.target)
    )
    drafter.to(torch.bfloat16).save_pretrained(settings.out)
    stage = {
        **provenance.conditions(),
        "drafter": "quickmerge",
        "parameters": num_parameters(QuickMergePrior, config),
        "target_fingerprint": fingerprint,
        "draft_vocab_size": config.draft_vocab_size,
        "seed": settings.seed,
        "steps": 0,
        "rows": 0,
    }
    provenance.write_stage(settings.out, stage)
    return stage
