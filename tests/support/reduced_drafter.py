"""A drafter's copy that proposes the most frequent tokens alone."""

from qm_spec.drafter.vocabulary import choose_tokens


def with_draft_vocabulary(drafter, target, counts, size=512):
    """Return the drafter with a draft vocabulary by token counts `[V]`, its weights and the target's rows."""
    config = type(drafter.config)(**{**drafter.config.to_dict(), "draft_vocab_size": size})
    reduced = type(drafter)(config).eval()
    missing, unexpected = reduced.load_state_dict(drafter.state_dict(), strict=False)
    assert set(missing) <= {"d2t", "lm_head.weight"} and not unexpected
    reduced.draft_token_ids = choose_tokens(counts, size, required=[0])
    if "lm_head.weight" in missing:
        reduced.lm_head.weight.data.copy_(target.lm_head.weight[reduced.draft_token_ids])
    return reduced
