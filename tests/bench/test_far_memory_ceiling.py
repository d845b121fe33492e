"""The ceiling of a far memory: what is not restricted is exact, and what survives is counted as told."""

import far_attention
import far_memory_ceiling
import pytest
import torch
from far_attention import SINKS, Layer, Split, everything, fitted, learned, mean, paging, real, rule, walk, window
from far_memory_ceiling import Record, Settings, append_record, predict, read_records, sum_up
from long_prompts import LongText
from restricted_target import RestrictedTarget
from transformers import LlamaConfig, LlamaForCausalLM

from qm_spec.compression.rotary import Rotary

PROMPT = torch.randint(0, 64, (90,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def read(model) -> tuple[RestrictedTarget, list[int]]:
    reader = RestrictedTarget(model, 128)
    reader.prefill(PROMPT)
    return reader, reader.write(PROMPT[-1], len(PROMPT) - 1, 12, None)


def layer(num_tokens: int = 40) -> Layer:
    torch.manual_seed(2)
    keys, values = torch.randn(2, num_tokens, 16), torch.randn(2, num_tokens, 16)
    return Layer(keys, values, torch.randn(2, 60, 16), Rotary(0.5 ** torch.arange(8)))


def output(found: far_attention.Memory, queries: torch.Tensor) -> torch.Tensor:
    scores = queries @ found.keys.transpose(1, 2) * 16**-0.5
    if found.bias is not None:
        scores = scores + found.bias[:, None]
    return scores.softmax(-1) @ found.values


def test_the_target_writes_what_transformers_writes(model, read) -> None:
    ids = torch.tensor([PROMPT])
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert read[1] == whole[0, len(PROMPT) :].tolist()


def test_another_prompt_overwrites_the_last_one(model, read) -> None:
    reader, _ = read
    shorter = PROMPT[20:70]
    reader.prefill(shorter)
    again = RestrictedTarget(model, 128)
    again.prefill(shorter)
    assert reader.write(shorter[-1], 49, 8, None) == again.write(shorter[-1], 49, 8, None)


def test_nothing_restricted_reproduces_the_answer_and_little_read_does_not(read) -> None:
    reader, answer = read
    agree = predict(reader, PROMPT, answer, [(name, budget) for name in far_attention.RULES for budget in (16, 89)])
    assert agree["all"] == "1" * 12
    assert all(agree[f"{name} 89"] == agree["all"] for name in far_attention.RULES)
    assert "0" in agree["window 16"]
    # The computation itself, not the short cut for budgets that hold the prompt.
    rules = [everything, lambda one: window(one, 89), lambda one: mean(one, Split(89, 5, 89 - 5 - SINKS))]
    assert reader.predict([PROMPT[-1], *answer[:-1]], 89, rules) == [answer] * 3


@pytest.mark.parametrize("merge", [mean, real, far_attention.attended])
def test_groups_of_one_are_exact(merge) -> None:
    one = layer()
    found = merge(one, Split(40, 6, 30))
    torch.testing.assert_close(output(found, one.queries), output(everything(one), one.queries))


def test_least_squares_at_full_rank_is_exact_and_closer_than_what_it_began_with_below() -> None:
    one = layer()
    exact = output(everything(one), one.queries)
    full = fitted(one, Split(40, 6, 30), far_attention.attended)
    torch.testing.assert_close(output(full, one.queries), exact, atol=1e-4, rtol=1e-4)
    split = Split(40, 6, 12)
    for base in (mean, far_attention.attended):
        error = [(output(found, one.queries) - exact).norm() for found in (base(one, split), fitted(one, split, base))]
        assert error[1] < 0.7 * error[0]


def test_learned_entries_meet_the_output_better_than_those_they_began_with() -> None:
    one, split = layer(), Split(40, 6, 8)
    exact = output(everything(one), one.queries)
    with torch.inference_mode():
        found = [fitted(one, split, far_attention.attended), learned(one, split)]
    before, after = ((output(memory, one.queries) - exact).norm() for memory in found)
    assert after < 0.8 * before
    # What is raw stays so.
    assert torch.equal(found[1].keys[:, :SINKS], one.keys[:, :SINKS])
    assert torch.equal(found[1].values[:, -6:], one.values[:, -6:])


def test_a_merged_key_of_equal_keys_stands_at_their_mean_position() -> None:
    one = layer()
    plain = torch.randn(2, 1, 16).expand(2, 40, 16)
    same = Layer(one.rotary.rotate(plain, torch.arange(40)), one.values, one.queries, one.rotary)
    found = mean(same, Split(40, 6, 10))
    assert torch.equal(found.bias[0, SINKS:-6], torch.full((10,), 3.0).log())
    torch.testing.assert_close(found.keys[:, SINKS], same.keys[:, SINKS + 1])


@pytest.mark.parametrize("name", far_attention.RULES)
@pytest.mark.parametrize("budget", [64, 96, 128])
def test_no_rule_reads_more_than_its_budget(name: str, budget: int) -> None:
    one, chosen = layer(300), rule(name, 300, budget)
    if chosen is None:
        assert paging(300, budget, True)[1] == 0
        return
    found = chosen(one)
    if found.visible is None:
        assert found.keys.shape[1] == budget
        return
    seen = found.visible(one.queries.view(2, 2, 30, 16)).sum(-1)
    split, picked = paging(300, budget, name == "indexed pages")
    index = split.groups // 2 if name == "indexed pages" else 0
    assert picked and int(seen.max()) + index <= budget


def test_positions_and_steps_are_counted_by_hand() -> None:
    assert walk([True, True, False, True, True, True, True, True, True], 2) == [(0, 3), (3, 3), (6, 3)]
    assert walk([False, True, True, False], 2) == [(0, 1), (1, 3)]
    record = Record("code", 9, 0, 9, "000111000", {"all": "1" * 9, "window 4": "110111011"})
    found = {row["variant"]: row for row in sum_up([record], 2, 0) if row["kind"] == "code"}
    assert found["all"]["al"][0] == 3
    row = found["window 4"]
    assert row["p1"][0] == pytest.approx(7 / 9, abs=1e-4) and row["p1_new"][0] == pytest.approx(4 / 6, abs=1e-4)
    # Steps of 3, 3 and 1 tokens from 0, 3 and 6.
    assert row["al"][0] == pytest.approx(7 / 3, abs=1e-4) and row["al_new"][0] == 2
    assert row["gain"][0] == 0 and found["all"]["gain"][0] == 0


def test_gains_are_over_the_window_of_the_same_budget() -> None:
    agree = {"all": "1" * 9, "window 4": "000000000", "mean 4": "111111111"}
    rows = sum_up([Record("code", 9, number, 9, "0" * 9, agree) for number in range(5)], 2, 0)
    (row,) = [one for one in rows if (one["kind"], one["variant"]) == ("together", "mean 4")]
    assert row["gain"] == [2, 2, 2] and row["prompts"] == 5
    assert "2.00 (2.00 to 2.00)" in far_memory_ceiling.tables(rows)


def test_lookup_sees_nothing_behind_its_token() -> None:
    assert far_memory_ceiling.matches([1, 2, 3, 9, 1], [2, 3, 9, 5], 2) == "0111"


def test_a_run_goes_on_behind_its_records_and_refuses_others(tmp_path) -> None:
    file, settings = tmp_path / "prompts.jsonl", Settings("t", 8, 0, "m")
    record = Record("code", 9, 0, 2, "00", {"all": "11"})
    assert read_records(file, settings) == []
    append_record(file, record)
    assert read_records(file, settings) == [record]
    with pytest.raises(ValueError, match="give another --out"):
        read_records(file, Settings("t", 8, 1, "m"))


def test_prompts_of_a_text_begin_and_end_alike() -> None:
    text = LongText((1, 2), tuple(range(10, 40)), (3,))
    assert text.prompt(6) == [1, 2, 10, 11, 12, 3]
    with pytest.raises(ValueError, match="needs 31 tokens of text, got 30"):
        text.prompt(34)
