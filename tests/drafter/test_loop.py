"""The step-by-step paged cache computes what the training mask computes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qm_spec.config import MergeConfig
from qm_spec.drafter.loops.gathered import DraftLoop
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.ops.page import slot_elements
from qm_spec.training.drafter import DraftTraining

VOCAB, HIDDEN, STEPS, LENGTH = 64, 32, 3, 460


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def make_prior(schedule, next_token_values=False):
    torch.manual_seed(1)
    config = QuickMergeConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
        num_speculative_tokens=STEPS,
        next_token_values=next_token_values,
        quickmerge=MergeConfig(window=24, group_size=8, schedule=schedule).to_dict(),
    )
    prior = QuickMergePrior(config).eval()
    # Away from the zero initialisation, and far entries made to matter.
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(prior.layer.far_bias, 0.5)
    torch.nn.init.uniform_(prior.layer.slopes, 0.0, 0.05)
    return prior


@pytest.mark.parametrize(("schedule", "next_token_values"), [((4, 2, 1), False), ((4, 2, 1), True), ((0,), True)])
@torch.no_grad()
def test_training_mask_equals_step_by_step_cache(target, schedule, next_token_values):
    prior = make_prior(schedule, next_token_values)
    training = DraftTraining(prior, target)
    ids = torch.randint(0, VOCAB, (1, LENGTH))
    # Spans of two groups stand from 192 tokens on, of four from 384.
    rows = torch.tensor([[0, 1, 23, 24, 31, 32, 40, 77, 100, 131, 200, 215, 300, 431, LENGTH - STEPS - 1]])
    aux = training.read_target(ids).aux_states
    expected = training.unroll(aux, ids, rows)

    layer = prior.layer
    page_size, num_pages = 16, -(-LENGTH // 16) + 1
    block_table = (torch.randperm(num_pages - 1) + 1).int().unsqueeze(0)
    cache = torch.full((num_pages, 2, page_size, slot_elements(16, torch.float32)), float("nan"))
    seen = []
    loop = DraftLoop(
        layer,
        target.get_input_embeddings(),
        lambda hidden: seen.append(target.lm_head(hidden)) or seen[-1],
        prior.config.merge,
    )
    fused = layer.fuse(aux[0])
    for position in range(LENGTH - STEPS):
        slot = block_table[0, position // page_size].long() * page_size + position % page_size
        loop.remember(cache, fused[position : position + 1], ids[0, position + 1 : position + 2], slot.view(1))
        seen.clear()
        # One id past the end: the last sample of the last row feeds no further step.
        text = iter(torch.cat([ids[0], ids[0, :1]])[position + 2 :])
        loop.draft(
            cache,
            block_table,
            torch.tensor([position + 1], dtype=torch.int32),
            fused[position : position + 1],
            ids[0, position + 1 : position + 2],
            STEPS,
            lambda logits, text=text: next(text).view(1),
        )
        if position in rows[0]:
            column = (rows[0] == position).nonzero().item()
            for step in range(STEPS):
                torch.testing.assert_close(seen[step][0], expected[step][0, column], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_far_memory_changes_the_drafts(target):
    prior = make_prior((4, 2, 1))
    ids = torch.randint(0, VOCAB, (1, LENGTH))
    rows = torch.tensor([[20, LENGTH - STEPS - 1]])
    training = DraftTraining(prior, target)
    aux = training.read_target(ids).aux_states
    with_far = training.unroll(aux, ids, rows)
    prior.config.merge = MergeConfig(window=24, group_size=8, schedule=(0,))
    without = training.unroll(aux, ids, rows)
    assert torch.equal(with_far[0][0, 0], without[0][0, 0]), "inside the window nothing is merged"
    assert not torch.allclose(with_far[0][0, 1], without[0][0, 1])
