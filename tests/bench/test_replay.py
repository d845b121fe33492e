"""A replay counts what decoding token by token accepts: on tiny pairs here, and in vLLM on the shipped target."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from support.offline_engine import run_offline
from support.reduced_drafter import with_draft_vocabulary
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import qm_spec
from qm_spec.bench.acceptance import replay as replay_module
from qm_spec.bench.acceptance.replay import (
    Replay,
    expected_replay,
    expected_walk,
    read_text,
    replay,
    walk,
    write_continuations,
)
from qm_spec.bench.engine.metrics import DraftCounts
from qm_spec.config import MergeConfig
from qm_spec.discovery import target_fingerprint
from qm_spec.drafter.anchors import read_target
from qm_spec.drafter.checkpoint import load_drafter
from qm_spec.drafter.eagle3 import Eagle3Config, Eagle3Drafter
from qm_spec.drafter.head import draft_head
from qm_spec.drafter.loops.gathered import DraftLoop
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.ops.page import slot_elements
from qm_spec.training.documents import Document, DocumentBatches
from qm_spec.training.drafter import DraftTraining

# So few tokens that untrained drafters are often right.
VOCAB, HIDDEN, STEPS, LAYERS = 4, 32, 3, [1, 2, 3]
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "eagle_aux_hidden_state_layer_ids": LAYERS,
    "num_speculative_tokens": STEPS,
}
DRAFTERS = {
    "merged": {"schedule": (4, 2, 1), "next_token_values": True},
    "draft vocabulary": {"schedule": (4, 2, 1), "next_token_values": True, "draft_vocab_size": 3},
    "emptied": {"schedule": (0,), "next_token_values": False},
    "eagle3": {},
    "eagle3-vocabulary": {"draft_vocab_size": 3},
    "eagle3-window": {"sliding_window": 20},
    "eagle3-sinks": {"sliding_window": 16, "attention_sinks": 4},
}


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
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    # Greedy text of a model fresh from its initialisation is one token over and over.
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def make_drafter(kind):
    torch.manual_seed(1)
    settings = DRAFTERS[kind]
    if "schedule" in settings:
        merge = MergeConfig(window=24, group_size=8, schedule=settings["schedule"])
        following = settings["next_token_values"]
        sizes = {**SIZES, "draft_vocab_size": settings.get("draft_vocab_size")}
        drafter = QuickMergePrior(QuickMergeConfig(quickmerge=merge.to_dict(), next_token_values=following, **sizes))
    else:
        drafter = Eagle3Drafter(Eagle3Config(**settings, **SIZES))
    for name, parameter in drafter.named_parameters():
        if "norm" not in name:
            # Small beside the embedding: the drafts must depend on the tokens that rows are fed with.
            torch.nn.init.normal_(parameter, std=0.02 if "fc" in name else 0.4)
    if drafter.d2t is not None:
        drafter.draft_token_ids = torch.tensor([0, 1, 3])
    if "schedule" in settings:
        torch.nn.init.constant_(drafter.layer.far_bias, 0.5)
        torch.nn.init.uniform_(drafter.layer.slopes, 0.0, 0.05)
    return drafter.eval().requires_grad_(False)


def paged_draft(prior, target, token_ids):
    """Draft behind `[N + 1]` token ids, N of them read, from a paged cache that is filled token by token."""
    aux, _ = read_target(target, token_ids[None, :-1], LAYERS)
    fused, layer = prior.layer.fuse(aux[0]), prior.layer
    num_pages = -(-len(fused) // 16) + 1
    cache = torch.full((num_pages, 2, 16, slot_elements(8, torch.float32)), float("nan"))
    table = torch.arange(1, num_pages, dtype=torch.int32)[None]
    head = draft_head(prior, target).vocabulary_logits
    loop = DraftLoop(layer, target.get_input_embeddings(), head, prior.config.merge)
    for position in range(len(fused)):
        here = slice(position, position + 1)
        loop.remember(cache, fused[here], token_ids[position + 1 : position + 2], torch.tensor([16 + position]))
    count = torch.tensor([len(fused)], dtype=torch.int32)
    drafted = loop.draft(cache, table, count, fused[-1:], token_ids[-1:], STEPS, lambda logits: logits.argmax(-1))
    return drafted[0].tolist()


def plain_draft(eagle3, target, token_ids):
    """Draft behind `[N + 1]` token ids as EAGLE-3, knowing nothing of a later token."""
    embed = target.get_input_embeddings()
    aux, _ = read_target(target, token_ids[None], LAYERS)
    # The state of the newest token is not known to a drafter; its value must not matter.
    aux[:, -1] = float("nan")
    drafts = eagle3.read(aux, embed(token_ids[None])).anchors(torch.tensor([[len(token_ids) - 2]]))
    drafted, next_id, head = [], token_ids[-1], draft_head(eagle3, target)
    for _ in range(STEPS):
        next_id = head.best_tokens(drafts.step(embed(next_id)[None, None]))[0, 0]
        drafted.append(int(next_id))
    return drafted


def decode(drafter, target, prompt, num_tokens):
    """Decode speculatively, one verification at a time; return the text and the tokens accepted in each step."""
    draft = paged_draft if isinstance(drafter, QuickMergePrior) else plain_draft
    ids, accepted = torch.tensor(prompt), []
    ids = torch.cat([ids, target(ids[None]).logits[0, -1:].argmax(-1)])
    while len(ids) - len(prompt) < num_tokens:
        drafted = torch.tensor(draft(drafter, target, ids))
        verified = target(torch.cat([ids, drafted])[None]).logits[0, len(ids) - 1 :].argmax(-1)
        count = int((drafted == verified[:-1]).cumprod(0).sum())
        ids = torch.cat([ids, verified[: count + 1]])
        accepted.append(count)
    return ids[len(prompt) :].tolist(), tuple(accepted)


@pytest.mark.parametrize("name", DRAFTERS)
@torch.no_grad()
def test_the_counts_are_those_of_decoding_step_by_step(target, name, monkeypatch):
    drafter, num_tokens = make_drafter(name), 45
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in (1, 40, 180)]
    texts = write_continuations(target, prompts, num_tokens + STEPS - 1)
    seen = set()
    for prompt, text in zip(prompts, texts, strict=True):
        decoded, accepted = decode(drafter, target, prompt, num_tokens)
        assert decoded[:num_tokens] == text[:num_tokens], "decoding with drafts changed the text"
        read = read_text(target, prompt, text, LAYERS)
        assert replay(drafter, read, STEPS).accepted == accepted
        seen.update(accepted)
        with monkeypatch.context() as patch:
            # Rows one by one.
            patch.setattr(replay_module, "_MAX_SCORES", 1)
            assert replay(drafter, read, STEPS).accepted == accepted
    assert len(seen) >= 3, f"only the counts {seen} came up: the cases show little"


def test_what_a_drafter_remembers_shows_in_the_counts(target):
    """The two priors share their weights, as do the three EAGLE-3 drafters; only their memories differ."""
    prompt = torch.randint(0, VOCAB, (180,), generator=torch.Generator().manual_seed(6)).tolist()
    text = read_text(target, prompt, write_continuations(target, [prompt], 60)[0], LAYERS)
    assert len({replay(make_drafter(name), text, STEPS).accepted for name in DRAFTERS}) == len(DRAFTERS)


def test_counts_are_vllms():
    counts = Replay((2, 0, 3, 1), 3).counts
    assert counts == DraftCounts(4, 12, 6, (3, 2, 1)) and counts.acceptance_length == 2.5


@torch.no_grad()
def test_continuations_are_the_targets_own_and_batches_change_nothing(target):
    prompts = [[1, 2, 3], [3], [0, 0, 2], [2, 1, 3], [1]]
    together = write_continuations(target, prompts, 12, batch_size=2)
    for prompt, text in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in text:
            assert token == int(target(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
    sampled = [write_continuations(target, prompts, 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("name", ["merged", "eagle3"])
@torch.no_grad()
def test_near_temperature_zero_the_expectation_is_the_replay(target, name):
    drafter, prompt = make_drafter(name), [1, 2, 3]
    [text] = write_continuations(target, [prompt], 80)
    read = read_text(target, prompt, text, LAYERS)
    counts = replay(drafter, read, STEPS).counts
    expected = expected_replay(drafter, read, STEPS, temperature=1e-5)
    assert expected.steps == pytest.approx(counts.drafts, abs=1e-3)
    assert expected.acceptance_length == pytest.approx(counts.acceptance_length, abs=1e-3)


@pytest.mark.parametrize("name", ["merged", "eagle3-sinks"])
@torch.no_grad()
def test_expectations_average_to_those_of_rejection_sampling(target, name):
    """Over all texts of one step: the sum of p(text) E(text) is that of the products of min(p, q)."""
    drafter, prompt, temperature = make_drafter(name), [1, 2, 3, 0, 2], 0.7
    embed = target.get_input_embeddings()

    def p_of(ids):
        return torch.softmax(target(torch.tensor([ids])).logits[0, -1] / temperature, -1)

    def q_of(ids, number):
        """Distribution of the drafted token behind `ids`, of which the last `number` were drafted."""
        known = torch.tensor([ids])
        aux, _ = read_target(target, known, LAYERS)
        drafts = drafter.read(aux, embed(known)).anchors(torch.tensor([[len(ids) - number - 2]]))
        for position in range(len(ids) - number - 1, len(ids)):
            output = drafts.step(embed(known[:, position : position + 1]))
        return torch.softmax(target.lm_head(output)[0, 0] / temperature, -1)

    average, exact = 0.0, 0.0
    for text in itertools.product(range(VOCAB), repeat=3):
        ids = [*prompt, *text]
        first, second, third = (p_of(ids[: len(prompt) + number])[text[number]] for number in range(3))
        value = expected_replay(drafter, read_text(target, prompt, text, LAYERS), 2, temperature)
        assert value.steps == pytest.approx(1)
        average += float(first * second * third) * value.accepted
        near = torch.minimum(second, q_of(ids[:-2], 0)[text[1]])
        far = torch.minimum(third, q_of(ids[:-1], 1)[text[2]])
        # The first drafted token is counted once for all texts that share it.
        exact += float(first * near * (1 / VOCAB + far))
    assert average == pytest.approx(exact, rel=1e-4) and 0.05 < exact < 2


def test_walks_are_weighted_by_their_probability():
    """Three rows, K = 2: against the sum over every walk."""
    chances = torch.tensor([[0.9, 0.3], [0.5, 0.5], [0.2, 0.1]], dtype=torch.float64)
    exactly = torch.stack([1 - chances[:, 0], chances[:, 0] - chances[:, 1], chances[:, 1]], 1).tolist()

    def sums(row):
        if row >= 3:
            return 0.0, 0.0
        steps, accepted = 1.0, 0.0
        for count, chance in enumerate(exactly[row]):
            more = sums(row + count + 1)
            steps, accepted = steps + chance * more[0], accepted + chance * (count + more[1])
        return steps, accepted

    got = expected_walk(chances)
    assert (got.steps, got.accepted) == pytest.approx(sums(0))
    assert len(got.kept) == 2 and got.kept[0] > got.kept[1]


def test_a_walk_without_chance_is_the_walk():
    accepted = [2, 0, 3, 1, 0, 0, 3, 1, 2]
    chances = (torch.tensor(accepted).unsqueeze(-1) > torch.arange(3)).double()
    counts, expected = walk(accepted, 3).counts, expected_walk(chances)
    assert (expected.steps, expected.kept) == (counts.drafts, counts.accepted_per_position)


def test_texts_that_hold_no_step_are_refused(target):
    drafter, text = make_drafter("eagle3"), read_text(target, [1], [1, 2, 3, 0], LAYERS)
    for num_drafts in (0, 4):
        with pytest.raises(ValueError, match=rf"K must be in 1..3 for a continuation of 4 tokens, got {num_drafts}"):
            replay(drafter, text, num_drafts)
    with pytest.raises(ValueError, match="got 0; use replay"):
        expected_replay(drafter, text, STEPS, temperature=0)
    with pytest.raises(ValueError, match=r"reads layers \(1, 2, 3\), the text was read for \(0, 1, 2\)"):
        replay(drafter, read_text(target, [1], [1, 2, 3, 0], [0, 1, 2]), STEPS)
    with pytest.raises(ValueError, match="got 0 and 2 tokens"):
        read_text(target, [], [1, 2], LAYERS)


ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
NUM_DRAFTS, NUM_TOKENS = 4, 48


@pytest.fixture(scope="module")
def novels():
    return AutoModelForCausalLM.from_pretrained(ZOO / "target", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts(novels):
    """Prompts of 8 to 900 tokens and what the target writes, long enough for every step that vLLM verifies."""
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "target")
    lines = (ZOO / "prompts.jsonl").read_text().splitlines()
    prompts = [
        tokenizer(json.loads(line)["text"])["input_ids"][:length]
        for line, length in zip(lines, (8, 17, 129, 300, 560, 900), strict=False)
    ]
    return list(zip(prompts, write_continuations(novels, prompts, NUM_TOKENS + NUM_DRAFTS - 1), strict=True))


# How EAGLE-3 is trained to be compared with vLLM: its window, the layers it reads, and whether it norms them. The
# second has all that the first has not: a vocabulary of its own, too.
IN_VLLM = {"eagle3": (None, [6, 13, 19], False), "eagle3-reduced": (24, [0, 13, 19], True)}


def new_drafter(name):
    """Make a drafter for the novels target that is not shipped: a prior of today's kind, or EAGLE-3."""
    sizes = {**SIZES, "hidden_size": 192, "vocab_size": 4096, "num_attention_heads": 6, "head_dim": 32}
    sizes["num_speculative_tokens"] = NUM_DRAFTS
    if name == "qm_spec":
        sizes["eagle_aux_hidden_state_layer_ids"] = [0, 13, 19]
        fingerprint = target_fingerprint(ZOO / "target")
        return QuickMergePrior(
            QuickMergeConfig(**sizes, target_fingerprint=fingerprint, norm_aux_states=True, next_token_values=True)
        )
    sliding_window, sizes["eagle_aux_hidden_state_layer_ids"], fc_norm = IN_VLLM[name]
    return Eagle3Drafter(
        Eagle3Config(**sizes, sliding_window=sliding_window, fc_norm=fc_norm, max_position_embeddings=4096)
    )


@pytest.mark.parametrize("kind", DRAFTERS)
def test_the_trainer_counts_acceptance_as_a_replay_does(target, kind):
    """At each position; a replay counts what vLLM accepts, so the trainer's estimate is vLLM's on the same text."""
    drafter, prompt = make_drafter(kind), [0, 3, 1, 1, 2, 0]
    ((continuation),) = write_continuations(target, [prompt], 60)
    text = read_text(target, prompt, continuation, LAYERS)
    expected = replay_module.accepted_everywhere(drafter, text, STEPS)
    batch = DocumentBatches([Document.answered(prompt, continuation)], 1000)[0]
    with torch.no_grad():
        got = DraftTraining(drafter, target).eval()(**batch)["accepted"][0].tolist()
    assert sum(expected) > 5, "the drafts are hardly ever right: equal counts show little"
    # The trainer goes on where fewer than K tokens are left to compare with.
    assert got[: len(expected)] == expected


def trained_briefly(target, texts, name):
    """Train a new drafter for some steps on the very texts, so that it is accepted now and then."""
    torch.manual_seed(0)
    training = DraftTraining(new_drafter(name), target)
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2)
    ids = torch.tensor([[*prompt, *text][-64:] for prompt, text in texts[2:]])
    rows = torch.arange(60).expand(len(ids), -1)
    for _ in range(80):
        training(ids, rows, torch.ones_like(ids))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    drafter = training.drafter
    if name == "eagle3-reduced":
        drafter = with_draft_vocabulary(drafter, target, ids.flatten().bincount(minlength=4096))
    # As checkpoints are stored, and vLLM reads them.
    return drafter.to(torch.bfloat16)


@pytest.mark.vllm
@pytest.mark.usefixtures("most_drafts")
@pytest.mark.parametrize("name", ["qm_spec", *IN_VLLM])
def test_vllm_accepts_what_the_replay_says(novels, texts, name, tmp_path):
    """Request by request; vLLM runs EAGLE-3 with its own code, its sliding window included."""
    folder = tmp_path / "drafter"
    trained_briefly(novels, texts, name).save_pretrained(folder)
    speculation = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": NUM_DRAFTS}
    engine = {"model": str(ZOO / "target"), "max_model_len": 1024, "speculative_config": speculation}
    # Ours reads the prompt in pieces. Behind each vLLM tells EAGLE-3 a wrong token, the prompt's last one.
    engine["max_num_batched_tokens"] = 256 if name == "qm_spec" else 1024
    sampling = {"temperature": 0, "max_tokens": NUM_TOKENS}
    requests = [{"prompts": [{"prompt_token_ids": prompt}], "sampling": sampling} for prompt, _ in texts]
    run = run_offline(tmp_path, engine, requests)
    assert [answer[0] for answer in run["answers"]] == [text[:NUM_TOKENS] for _, text in texts]

    drafter, total = load_drafter(folder).eval(), DraftCounts()
    layers = drafter.config.eagle_aux_hidden_state_layer_ids
    for (prompt, text), counters in zip(texts, run["counters"], strict=True):
        total = total + replay(drafter, read_text(novels, prompt, text, layers), NUM_DRAFTS).counts
        got = [counters[f"vllm:spec_decode_num_{what}"] for what in ("drafts", "draft_tokens", "accepted_tokens")]
        assert got == [total.drafts, total.draft_tokens, total.accepted_tokens]
    assert total.accepted_tokens > 20, "the drafts are hardly ever right: equal counts show little"
