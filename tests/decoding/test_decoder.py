"""The speculative decoder: what it writes is the target's, exactly as long as asked, and its numbers are true."""

import json
import math
import shutil
import warnings

import pytest
import torch
from support.speculation import BareModel, BareModelWithMemory, Oracle, plain_greedy, tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qm_spec import create_speculative_decoder
from qm_spec.decoding import statistics
from qm_spec.decoding.bare_target import BareTarget
from qm_spec.decoding.cached_target import CachedTarget
from qm_spec.decoding.memory_drafter import MemoryDrafter, MemoryDraftModel
from qm_spec.decoding.prior_drafter import PriorDrafter, untrained_config
from qm_spec.decoding.speculation import SpeculativeDecoder
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.training.drafter import DraftTraining

VOCAB = 11


@pytest.fixture(scope="module")
def novels(root):
    return root / "qm_spec" / "zoo" / "novels"


@pytest.fixture(scope="module")
def target(novels):
    return AutoModelForCausalLM.from_pretrained(novels / "target", dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(novels):
    """Prompts of 200, 40 and 1 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(novels / "target")
    rows = [json.loads(line)["text"] for line in (novels / "prompts.jsonl").read_text().splitlines()[:3]]
    return [torch.tensor(tokenizer(text)["input_ids"][:n]) for text, n in zip(rows, (200, 40, 1), strict=True)]


@pytest.fixture(scope="module")
def greedy(target):
    with warnings.catch_warnings():
        # The shipped pair is found, so nothing is to be said about training.
        warnings.simplefilter("error")
        return create_speculative_decoder(target, temperature=0)


def padded(prompts, side="left"):
    width = max(len(prompt) for prompt in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def with_oracle(model, wrong_every=0, max_draft_len=4, temperature=0.0):
    """Return a decoder whose drafter is the target itself, wrong at some positions."""
    kind = CachedTarget(model, []) if isinstance(model, nn.Module) and hasattr(model, "config") else None
    return SpeculativeDecoder(
        kind or BareTarget(model, VOCAB, 24), Oracle(model, wrong_every), max_draft_len, temperature
    )


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]


def untrained(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_speculative_decoder(model, **settings)


# The shipped pair.


@pytest.mark.parametrize("number", [0, 1, 2])
def test_greedy_output_is_that_of_generate(target, greedy, prompts, number):
    prompt = prompts[number][None]
    expected = target.generate(prompt, max_new_tokens=24, do_sample=False)
    ids, stats = greedy.generate(prompt, max_new_tokens=24)
    assert torch.equal(ids, expected)
    assert stats["acceptance_length"] > 1.5, "a trained drafter, read at the right position and layers"


def test_a_padded_batch_is_its_rows(target, greedy, prompts):
    ids, mask = padded(prompts)
    expected = target.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    left, stats = greedy.generate(ids, attention_mask=mask, max_new_tokens=24)
    assert torch.equal(left, expected)
    right_ids, right_mask = padded(prompts, "right")
    right, _ = greedy.generate(right_ids, attention_mask=right_mask, max_new_tokens=24)
    width = ids.shape[1]
    assert torch.equal(right[:, :width], right_ids) and torch.equal(right[:, width:], left[:, width:])
    alone = [greedy.generate(prompt[None], max_new_tokens=24) for prompt in prompts]
    assert all(torch.equal(one[0, -24:], row[-24:]) for (one, _), row in zip(alone, left, strict=True))
    for count in ("drafted_tokens", "accepted_tokens", "drafts", "generated_tokens"):
        assert stats[count] == sum(single[count] for _, single in alone)


def test_greedy_output_is_that_of_assisted_generation(target, greedy, prompts):
    prompt = prompts[1][None]
    ids, _ = greedy.generate(prompt, max_new_tokens=24)
    looked_up = target.generate(prompt, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(ids, looked_up)


def test_third_party_models_agree_with_assisted_generation(shared):
    folder = shared("models/bitllama-3M")
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assistant = AutoModelForCausalLM.from_pretrained(shared("models/stories260K"), dtype=torch.float32)
    prompt = torch.tensor([AutoTokenizer.from_pretrained(folder)("Once upon a time there was a")["input_ids"]])
    with pytest.warns(UserWarning, match="qm-spec train"):
        decoder = create_speculative_decoder(target, temperature=0)
    expected = target.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=assistant)
    assert torch.equal(decoder.generate(prompt, max_new_tokens=24)[0], expected)


def test_the_prior_reads_the_states_it_was_trained_on(target, greedy, prompts):
    run = greedy.target.start(1, 64, None)
    training = DraftTraining(greedy.drafter, target)
    reading = training.read_target(prompts[1][None])
    everywhere = torch.ones_like(prompts[1][None], dtype=torch.bool)
    expected, logits = reading.aux_states, reading.logits(everywhere)[None]
    with torch.no_grad():
        got_logits, states = run.read(prompts[1][None])
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_logits, logits, rtol=1e-4, atol=1e-4)


def test_sampling_is_reproducible_and_rows_are_independent(target, prompts):
    decoder = create_speculative_decoder(target, temperature=0.8)
    ids, mask = padded(prompts)
    both, _ = decoder.generate(ids, attention_mask=mask, max_new_tokens=12, seed=[11, 12, 13])
    for row, prompt in enumerate(prompts):
        alone, _ = decoder.generate(prompt[None], max_new_tokens=12, seed=[11 + row])
        assert torch.equal(alone[0, -12:], both[row, -12:])
    again, _ = decoder.generate(ids, attention_mask=mask, max_new_tokens=12, seed=[11, 12, 13])
    other, _ = decoder.generate(ids, attention_mask=mask, max_new_tokens=12, seed=[21, 22, 23])
    assert torch.equal(again, both) and not torch.equal(other, both)


def test_one_seed_gives_every_row_its_own_stream_and_none_takes_torchs(target, prompts):
    decoder = create_speculative_decoder(target, temperature=1.0)
    ids = prompts[1].expand(2, -1)
    first, _ = decoder.generate(ids, max_new_tokens=12, seed=3)
    assert torch.equal(first, decoder.generate(ids, max_new_tokens=12, seed=3)[0])
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(0)
    drawn, _ = decoder.generate(ids, max_new_tokens=12)
    torch.manual_seed(0)
    assert torch.equal(drawn, decoder.generate(ids, max_new_tokens=12)[0])


# Rows that accept different numbers, in every kind of cache.

SIZES = {"vocab_size": VOCAB, "eos_token_id": None, "bos_token_id": None}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
MODELS = {
    "llama": lambda: tiny_llama(VOCAB, 0.3),
    "sliding window": lambda: random_weights(
        MistralForCausalLM(MistralConfig(**SIZES, **LLAMA, num_key_value_heads=1, sliding_window=6))
    ),
    "learned positions": lambda: random_weights(
        GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=38))
    ),
    "bare": lambda: BareModel(VOCAB),
}


def random_weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_ragged_acceptance_leaves_the_output_alone(name):
    model = MODELS[name]()
    prompts = prompts_of(9, 1, 5, 14)
    ids, mask = padded(prompts)
    decoder = with_oracle(model, wrong_every=5)
    new_ids, stats = decoder.generate(ids, attention_mask=mask, max_new_tokens=24)
    for prompt, row in zip(prompts, new_ids, strict=True):
        assert torch.equal(row[-24:], plain_greedy(model, prompt[None], 24)[0, -24:])
    rates = [a / d for a, d in zip(stats["accepted_per_position"], stats["drafted_per_position"], strict=True)]
    assert 0 < rates[-1] < rates[0] < 1, "rows differed in what they accepted"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_a_drafter_that_is_the_target_is_always_right(name, temperature):
    model = MODELS[name]()
    ids, stats = with_oracle(model, temperature=temperature).generate(
        torch.stack(prompts_of(6, 6)), max_new_tokens=21, seed=0
    )
    assert ids.shape == (2, 27)
    assert stats["acceptance_rate"] == 1 and stats["acceptance_length"] == 5
    assert stats["steps"] == 4, "the first token, then four steps of five"


def test_acceptance_asks_for_the_drafted_token_only_row_by_row():
    """The reference compared whole distributions of the whole batch: nothing ever passed."""
    model = tiny_llama(500, 0.3)
    model.config.vocab_size = 500
    ids = torch.randint(500, (3, 4), generator=torch.Generator().manual_seed(0))
    _, stats = with_oracle(model, wrong_every=7).generate(ids, max_new_tokens=30)
    assert 0.5 < stats["acceptance_rate"] < 1


# Lengths and ends.


@pytest.mark.parametrize("max_draft_len", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["llama", "bare"])
def test_max_new_tokens_counts_tokens_exactly(name, max_draft_len):
    model = MODELS[name]()
    prompt = prompts_of(4)[0][None]
    expected = plain_greedy(model, prompt, 10)
    for wrong_every in (0, 2, 3):
        decoder = with_oracle(model, wrong_every, max_draft_len)
        for count in (0, 1, 2, 3, 6, 10):
            ids, stats = decoder.generate(prompt, max_new_tokens=count)
            assert torch.equal(ids, expected[:, : 4 + count])
            assert stats["generated_tokens"] == count
            assert stats["drafted_tokens"] <= max(0, (count - 1) * max_draft_len)
            if wrong_every == 0:
                assert stats["accepted_tokens"] == stats["drafted_tokens"], "none was drafted beyond the end"


@pytest.mark.parametrize("name", ["llama", "bare"])
def test_eos_inside_a_draft_ends_the_row_there(name):
    model = MODELS[name]()
    prompts = prompts_of(5, 5)
    plain = [plain_greedy(model, prompt[None], 20)[0, 5:].tolist() for prompt in prompts]
    decoder = with_oracle(model)
    for eos in range(VOCAB):
        ids, stats = decoder.generate(torch.stack(prompts), max_new_tokens=20, eos_token_id=eos, pad_token_id=99)
        rows = [row[: row.index(eos) + 1] if eos in row else row for row in plain]
        longest = max(map(len, rows))
        assert ids[:, 5:].tolist() == [row + [99] * (longest - len(row)) for row in rows]
        assert stats["generated_tokens"] == sum(map(len, rows))
        # Every fifth token and the last are the target's own; what was accepted behind an EOS does not count.
        assert stats["accepted_tokens"] == sum(i % 5 != 0 and i != 19 for row in rows for i in range(1, len(row)))
    several, _ = decoder.generate(prompts[0][None], max_new_tokens=20, eos_token_id=[plain[0][3], plain[0][6]])
    assert several[0, 5:].tolist() == plain[0][: min(plain[0].index(plain[0][3]), plain[0].index(plain[0][6])) + 1]


def test_eos_comes_from_the_generation_config_and_can_be_switched_off():
    model = tiny_llama(VOCAB, 0.3)
    prompt = prompts_of(5)[0][None]
    plain = plain_greedy(model, prompt, 12)[0, 5:].tolist()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [plain[4]], 0
    decoder = with_oracle(model)
    ids, _ = decoder.generate(prompt, max_new_tokens=12)
    assert torch.equal(ids, model.generate(prompt, max_new_tokens=12, do_sample=False))
    assert ids[0, 5:].tolist() == plain[: plain.index(plain[4]) + 1]
    assert decoder.generate(prompt, max_new_tokens=12, eos_token_id=())[0][0, 5:].tolist() == plain


# Statistics.


def test_counts_add_up():
    model = tiny_llama(VOCAB, 0.3)
    _, stats = with_oracle(model, wrong_every=3).generate(prompts_of(6)[0][None], max_new_tokens=30)
    # Of one row: the prompt's token, and per step the accepted ones and one of the target's own.
    assert stats["generated_tokens"] == 30 == 1 + stats["accepted_tokens"] + stats["steps"]
    assert sum(stats["drafted_per_position"]) == stats["drafted_tokens"]
    assert sum(stats["accepted_per_position"]) == stats["accepted_tokens"]
    assert stats["acceptance_rate"] == stats["accepted_tokens"] / stats["drafted_tokens"]
    assert stats["acceptance_length"] == 1 + stats["accepted_tokens"] / stats["drafts"]
    assert stats["drafted_per_position"] == sorted(stats["drafted_per_position"], reverse=True)
    assert json.loads(json.dumps(stats)) == stats


def test_seconds_come_from_the_clock(monkeypatch):
    """A pass of the target takes 1 s on this clock, a draft 0.25 s, whatever else happens."""
    now = [0.0]
    monkeypatch.setattr(statistics.time, "perf_counter", lambda: now[0])
    model = tiny_llama(VOCAB, 0.3)
    decoder = with_oracle(model, wrong_every=3)
    passes = []
    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1.0))
    # The oracle's own passes of the target stand for the draft model.
    drafter = tiny_llama(VOCAB, 0.3)
    drafter.register_forward_hook(lambda *_: passes.append(1) or now.__setitem__(0, now[0] + 0.25))
    decoder._drafter.module = drafter
    _, stats = decoder.generate(prompts_of(6)[0][None], max_new_tokens=30)
    assert stats["prefill_s"] == 1
    assert stats["verify_s"] == stats["steps"]
    assert stats["draft_s"] == len(passes) * 0.25 == stats["drafted_tokens"] * 0.25
    assert stats["decode_s"] == stats["draft_s"] + stats["verify_s"]
    assert stats["elapsed_s"] == stats["decode_s"] + 1
    assert stats["tokens_per_s"] == 30 / stats["elapsed_s"]
    assert stats["plain_step_s"] == 1
    assert stats["avg_speedup"] == 29 / stats["decode_s"]


def test_nothing_decoded_is_no_number():
    prompt = prompts_of(3)[0][None]
    ids, stats = with_oracle(tiny_llama(VOCAB)).generate(prompt, max_new_tokens=1)
    assert ids.shape == (1, 4) and stats["generated_tokens"] == 1
    assert math.isnan(stats["acceptance_rate"]) and math.isnan(stats["avg_speedup"])
    _, stats = with_oracle(tiny_llama(VOCAB)).generate(prompt, max_new_tokens=9, measure_speedup=False)
    assert math.isnan(stats["avg_speedup"]) and stats["tokens_per_s"] > 0


# The drafters.


@torch.no_grad()
def test_the_priors_cache_is_the_same_in_ragged_steps_as_in_one():
    model = tiny_llama(VOCAB)
    torch.manual_seed(1)
    config = untrained_config(model)
    config.next_token_values = True
    config.merge = type(config.merge)(window=12, group_size=4, schedule=(2, 1))
    prior = QuickMergePrior(config)
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    drafter = PriorDrafter(prior, model)
    states, lengths = torch.randn(2, 60, 48), torch.tensor([60, 43])
    whole, steps = (drafter.start(2, 64, None) for _ in range(2))
    token_ids = torch.randint(VOCAB, (2, 61))
    whole.remember(token_ids[:, :60], states, lengths)
    done = torch.zeros(2, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    while bool((done < lengths).any()):
        if len(done) == 2 and done[1] == lengths[1]:
            # The shorter row is complete: the longer goes on alone.
            for run in (steps, whole):
                run.select(torch.tensor([0]))
            done, lengths, states, token_ids = done[:1], lengths[:1], states[:1], token_ids[:1]
        counts = torch.minimum(torch.randint(1, 6, done.shape, generator=generator), lengths - done)
        index = (done.unsqueeze(1) + torch.arange(6)).clamp_max(59)
        chunk = states.gather(1, index.unsqueeze(-1).expand(-1, -1, 48))
        steps.remember(token_ids.gather(1, index), chunk, counts)
        done = done + counts
        seen = []
        next_ids = token_ids.gather(1, done.unsqueeze(1)).squeeze(1)
        steps.draft(next_ids, 3, lambda x, seen=seen: seen.append(x) or x.argmax(-1))
    expected = []
    whole.draft(next_ids, 3, lambda x: expected.append(x) or x.argmax(-1))
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("with_memory", [True, False])
def test_the_draft_models_cache_computes_what_its_forward_does(with_memory):
    model = MemoryDraftModel(VOCAB, 24, quickmerge_dim=16, k_max=4)
    memory = torch.randn(3, 9, 24) if with_memory else None
    run = MemoryDrafter(model, torch.device("cpu")).start(3, 40, memory)
    texts, next_ids = [[], [], []], None
    generator = torch.Generator().manual_seed(0)
    for chunk in (7, 3, 4, 3, 5):
        counts = torch.randint(1, chunk + 1, (3,), generator=generator)
        ids = torch.randint(VOCAB, (3, chunk), generator=generator)
        if next_ids is not None:
            # The first of each row is the token that the last draft began with.
            ids[:, 0] = next_ids
        run.remember(ids, torch.empty(3, chunk, 0), counts)
        for text, row, count in zip(texts, ids.tolist(), counts.tolist(), strict=True):
            text.extend(row[:count])
        next_ids = torch.randint(VOCAB, (3,), generator=generator)
        drafted = run.draft(next_ids, 3, lambda logits: logits.argmax(-1))
        for row, text in enumerate(texts):
            ids = torch.tensor([[*text, int(next_ids[row])]])
            for token in drafted[row].tolist():
                logits = model(ids, None if memory is None else memory[row : row + 1])
                assert token == logits[0, -1].argmax()
                ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_compressed_states_reach_the_draft_and_the_target():
    decoder = untrained(BareModelWithMemory(VOCAB), vocab_size=VOCAB, dim=24, k_max=4, temperature=0)
    ids, layers = prompts_of(5)[0][None], torch.randn(2, 1, 30, 24, generator=torch.Generator().manual_seed(0))
    model = decoder.drafter
    assert model.compress(layers).shape == (1, 4, 64), "30 states in two layers are 4 merged tokens"
    assert not torch.equal(model(ids, layers), model(ids, -layers))
    got, _ = decoder.generate(ids, layers, max_new_tokens=12)
    bound = decoder.target.module
    by_hand = plain_greedy(lambda token_ids: bound(token_ids, layers[-1].expand(1, -1, -1)), ids, 12)
    assert torch.equal(got, by_hand)
    assert not torch.equal(got, decoder.generate(ids, -layers, max_new_tokens=12)[0])


def test_rows_of_a_bare_module_are_independent():
    decoder = untrained(BareModelWithMemory(VOCAB), vocab_size=VOCAB, dim=24, temperature=0.7)
    prompts = prompts_of(7, 2)
    ids, mask = padded(prompts)
    states = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(0))
    both, _ = decoder.generate(ids, states, 20, attention_mask=mask, seed=[1, 2])
    for row, prompt in enumerate(prompts):
        alone, _ = decoder.generate(prompt[None], states[row : row + 1], 20, seed=[1 + row])
        assert torch.equal(alone[0, -20:], both[row, -20:])


def test_training_the_draft_model_raises_acceptance_and_it_can_be_saved(tmp_path):
    target = BareModel(VOCAB, seed=3)
    prompt = prompts_of(3)[0][None]
    decoder = untrained(target, vocab_size=VOCAB, temperature=0, quickmerge_dim=32)
    text, before = decoder.generate(torch.stack(prompts_of(*[3] * 8)), max_new_tokens=60)
    optimizer = torch.optim.Adam(decoder.drafter.parameters(), 5e-3)
    for _ in range(60):
        logits = decoder.drafter(text[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, after = decoder.generate(prompt, max_new_tokens=60)
    assert after["acceptance_rate"] > before["acceptance_rate"] + 0.3
    torch.save(decoder.drafter.state_dict(), tmp_path / "draft.pt")
    model = MemoryDraftModel(VOCAB, 32, 32, seed=9)
    model.load_state_dict(torch.load(tmp_path / "draft.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = create_speculative_decoder(target, drafter=model, temperature=0)
    again, stats = loaded.generate(prompt, max_new_tokens=60)
    assert torch.equal(again, ids) and stats["accepted_tokens"] == after["accepted_tokens"]


def test_an_untrained_drafter_works_with_a_warning_and_its_seed_decides_it():
    model = tiny_llama(VOCAB, 0.3)
    prompt = prompts_of(5)[0][None]
    with pytest.warns(UserWarning, match=r"untrained.*right but slow(.|\n)*qm-spec train"):
        decoder = create_speculative_decoder(model, VOCAB, 16, quickmerge_dim=8, k_max=32, temperature=0)
    assert decoder.drafter.config.head_dim * decoder.drafter.config.num_key_value_heads == 8
    assert torch.equal(decoder.generate(prompt, max_new_tokens=20)[0], plain_greedy(model, prompt, 20))
    with pytest.warns(UserWarning, match="untrained"):
        bare = create_speculative_decoder(BareModel(VOCAB), VOCAB)
    for make, target in ((untrained, model), (lambda m, **k: untrained(m, vocab_size=VOCAB, **k), BareModel(VOCAB))):
        state = torch.random.get_rng_state()
        one, same, other = (make(target, seed=seed).drafter for seed in (4, 4, 5))
        assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state is left alone"
        equal = [torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True)]
        differ = [torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
        assert all(equal) and not all(differ)
    assert bare.max_draft_len == 4


# Targets as they come.


def test_dropout_is_off_while_decoding_and_the_mode_comes_back():
    model = BareModel(VOCAB)
    expected = plain_greedy(model, prompts_of(4)[0][None], 15)
    model.train()
    model.rnn.eval()
    ids, _ = with_oracle(model, 3).generate(prompts_of(4)[0][None], max_new_tokens=15)
    assert torch.equal(ids, expected)
    assert model.training and model.dropout.training and not model.rnn.training


def test_an_object_with_logits_will_do_and_ids_keep_their_type():
    class Wrapped(BareModel):
        def forward(self, token_ids):
            return type("Out", (), {"logits": super().forward(token_ids)})()

    ids = prompts_of(4)[0][None].int()
    got, _ = with_oracle(Wrapped(VOCAB)).generate(ids, max_new_tokens=9)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), plain_greedy(BareModel(VOCAB), ids.long(), 9))


def test_a_module_that_looks_ahead_is_refused():
    class Bidirectional(BareModel):
        def forward(self, token_ids):
            return super().forward(token_ids) + self.embed(token_ids).mean(1, keepdim=True)[..., :VOCAB]

    with pytest.raises(ValueError, match="must be causal"):
        with_oracle(Bidirectional(VOCAB)).generate(prompts_of(4)[0][None], max_new_tokens=9)


def test_half_precision_works():
    model = tiny_llama(VOCAB, 0.3).bfloat16()
    decoder = untrained(model, temperature=0.7)
    ids, stats = decoder.generate(torch.stack(prompts_of(4, 4)), max_new_tokens=9, seed=0)
    assert ids.shape == (2, 13) and stats["generated_tokens"] == 18


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: T5ForConditionalGeneration(
                T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)
            ),
            "encoder-decoder",
        ),
        (
            lambda: BertForMaskedLM(
                BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
            ),
            "vocabulary head",
        ),
        (lambda: tiny_llama().model, "vocabulary head"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)), "cannot be dropped"),
    ],
    ids=["T5", "BERT", "no head", "Mamba"],
)
def test_models_that_cannot_be_decoded_so_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        create_speculative_decoder(model())


def test_a_generation_config_with_penalties_is_said_to_be_ignored():
    model = tiny_llama()
    model.generation_config.repetition_penalty = 1.3
    prior = QuickMergePrior(untrained_config(model))
    with pytest.warns(UserWarning, match=r"repetition_penalty.*not applied"):
        create_speculative_decoder(model, drafter=prior)


# Wrong use.


def test_another_targets_drafter_is_refused(novels, tmp_path, target):
    drafter = novels / "drafter"
    with pytest.raises(ValueError, match="one of this target"):
        create_speculative_decoder(tiny_llama(), drafter=drafter)
    other = shutil.copytree(novels / "target", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (other / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with pytest.raises(ValueError, match="fingerprint"):
        create_speculative_decoder(model, drafter=drafter)
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        create_speculative_decoder(target, drafter=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"1\.\.111 for this drafter"):
        create_speculative_decoder(target, max_draft_len=112)


def test_a_drafter_folder_is_loaded(novels, target):
    decoder = create_speculative_decoder(target, drafter=novels / "drafter", max_draft_len=2)
    assert decoder.max_draft_len == 2
    assert create_speculative_decoder(target, drafter=decoder.drafter).max_draft_len == 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_model": "gpt2"}, TypeError, "from_pretrained"),
        ({"vocab_size": 12}, ValueError, "target's 11 and 16, got 12"),
        ({"dim": 12}, ValueError, "leave them out"),
        ({"max_draft_len": 0}, ValueError, "max_draft_len must be"),
        ({"max_draft_len": 2.0}, TypeError, "integer"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"quickmerge_dim": 0}, ValueError, "quickmerge_dim"),
        ({"drafter": nn.Linear(1, 1)}, TypeError, "QuickMergePrior"),
        ({"target_model": BareModel()}, TypeError, "vocab_size must be given"),
        ({"target_model": BareModel(), "vocab_size": 11, "k_max": 0}, ValueError, "k_max"),
        ({"target_model": BareModel(), "drafter": "folder"}, TypeError, "MemoryDraftModel"),
        ({"target_model": BareModel(), "drafter": MemoryDraftModel(7, 8)} | {"vocab_size": 9}, ValueError, "leave"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_wrong_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        untrained(**{"model": settings.get("target_model", tiny_llama()), **drop(settings, "target_model")})


def drop(values, name):
    return {key: value for key, value in values.items() if key != name}


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": IDS[0]}, ValueError, "unsqueeze"),
        ({"input_ids": IDS[:, :0]}, ValueError, "T at least 1"),
        ({"input_ids": IDS.float()}, TypeError, "int64"),
        ({"input_ids": IDS + 5}, ValueError, r"0\.\.10, got 6\.\.11"),
        ({"attention_mask": IDS[:1]}, ValueError, r"must be \[2, 3\]"),
        ({"attention_mask": torch.tensor([[0, 0, 1], [0, 0, 0]])}, ValueError, r"none in rows \[1\]"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens"),
        ({"seed": [1, 2, 3]}, ValueError, "each of 2 rows"),
        ({"hidden_states": torch.zeros(2, 4, 16)}, ValueError, "leave them out"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_wrong_calls_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        untrained(tiny_llama()).generate(**{"input_ids": IDS, **arguments})


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        (None, TypeError, "hidden_states must be given"),
        (torch.zeros(2, 24), ValueError, r"\[B, S, D\]"),
        (torch.zeros(1, 5, 24), ValueError, "B = 2"),
        (torch.zeros(2, 5, 23), ValueError, "D = 24"),
        (torch.zeros(2, 5, 24, dtype=torch.int64), TypeError, "floats"),
    ],
)
def test_wrong_encoder_states_are_refused(states, error, message):
    decoder = untrained(BareModelWithMemory(VOCAB), vocab_size=VOCAB, dim=24)
    with pytest.raises(error, match=message):
        decoder.generate(IDS, states)


@pytest.mark.parametrize("returned", [lambda ids: ids, lambda ids: (ids,)], ids=["shape", "tuple"])
def test_a_target_without_logits_is_told_so(returned):
    class Wrong(nn.Module):
        def forward(self, token_ids):
            return returned(token_ids)

    with pytest.raises((TypeError, ValueError), match="logits"):
        untrained(Wrong(), vocab_size=VOCAB).generate(IDS)
