"""Losses by distance: of a model whose loss is known, and of a tiny one against a forward by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qm_spec.evaluation.context_use import loss_by_distance
from qm_spec.training.dependent import Document, Span, generate_many

VOCABULARY, BEGIN, BOOST = 2000, 1, 9.0
# Loss of a token that is one of VOCABULARY equal ones; that is boosted; that is not, where another is.
UNIFORM = math.log(VOCABULARY)
MISSED = math.log(VOCABULARY - 1 + math.exp(BOOST))
TOLD = MISSED - BOOST


class CopyModel:
    """Expects after a token what followed it at its latest earlier place, and anything where there is none."""

    device = torch.device("cpu")

    def __init__(self, max_positions=None):
        self.config = SimpleNamespace(max_position_embeddings=max_positions)
        self.lengths = []

    def __call__(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        self.lengths.append(input_ids.shape[1])
        for row, ids in enumerate(input_ids.tolist()):
            follower = {}
            for place, token in enumerate(ids):
                if token in follower:
                    logits[row, place, follower[token]] = BOOST
                if place + 1 < len(ids):
                    follower[token] = ids[place + 1]
        return SimpleNamespace(logits=logits)


def letters(start, count):
    """Letters that stand nowhere else; the tokenizer makes one token of each."""
    return "".join(chr(0x4E00 + i) for i in range(start, start + count))


def letter_tokenizer(begin=False):
    vocabulary = {"?": 0, "<s>": BEGIN, **{letter: i + 2 for i, letter in enumerate(letters(0, VOCABULARY - 2))}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair=None, special_tokens=[("<s>", BEGIN)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="?")


def document(distance, length, before=5, told=True):
    """Write unique letters, in which `length` of them and the one before come again at a distance."""
    source = before + 1
    between = distance - length - 1
    text = letters(0, source + length + between)
    again = text[before : source + length] if told else letters(1500, length + 1)
    start = len(text) + 1
    return Document(text + again + letters(1000, 7), "test", (Span(start, start + length, source),))


@pytest.mark.parametrize("begin", [False, True])
def test_a_copying_model_has_the_losses_it_must_have(begin):
    tokenizer = letter_tokenizer(begin)
    documents = [document(64, 4), document(127, 10), document(128, 6), document(63, 3), document(600, 5)]
    near, middle, other = loss_by_distance(CopyModel(), tokenizer, documents, buckets=(64, 128, 256))
    assert (near.distances, middle.distances, other.distances) == ((64, 128), (128, 256), None)
    assert (near.num_documents, near.num_spans, near.num_tokens) == (2, 2, 14)
    assert (middle.num_documents, middle.num_spans, middle.num_tokens) == (1, 1, 6)
    for row in (near, middle):
        assert row.loss == pytest.approx(TOLD, abs=1e-5)
        assert row.loss_without == pytest.approx(UNIFORM, abs=1e-5)
        assert row.gain == pytest.approx(UNIFORM - TOLD, abs=1e-5)
    assert near.loss_error == pytest.approx(0, abs=1e-5) and math.isnan(middle.loss_error)
    # All other letters are new; the model expects the source's next one after each span.
    num_other = sum(len(d.text) - (d.spans[0].end - d.spans[0].start) - (not begin) for d in documents)
    assert (other.num_documents, other.num_spans, other.num_tokens) == (5, 0, num_other)
    assert other.loss == pytest.approx(((num_other - 5) * UNIFORM + 5 * MISSED) / num_other, abs=1e-4)
    assert math.isnan(other.loss_without) and math.isnan(other.gain)


def test_the_error_is_that_of_documents():
    documents = [document(100, 8), document(100, 8, told=False)]
    row = loss_by_distance(CopyModel(), letter_tokenizer(), documents, buckets=(64, 128))[0]
    assert row.loss == pytest.approx((TOLD + UNIFORM) / 2, abs=1e-5)
    # Two values with mean m have the standard error |a - b| / 2.
    assert row.loss_error == pytest.approx((UNIFORM - TOLD) / 2, abs=1e-5)
    assert row.gain_error == pytest.approx((UNIFORM - TOLD) / 2, abs=1e-5)
    assert row.loss_without_error == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("begin", [False, True])
def test_the_source_is_out_of_the_short_context(begin):
    # The source's last letters are among the 32 before the span, and the first of them tells the next.
    text = letters(0, 70)
    near = Document(text + text[:69], "test", (Span(74, 139, 4),))
    model = CopyModel()
    row = loss_by_distance(model, letter_tokenizer(begin), [near], buckets=(64, 128))[0]
    assert row.loss == pytest.approx(TOLD, abs=1e-5)
    assert row.loss_without == pytest.approx(UNIFORM, abs=1e-5)
    # The letters 69..73 stay, and the token that begins a text.
    assert model.lengths == [139 + begin, 5 + 65 + begin]


def test_a_document_is_cut_at_the_models_positions():
    whole = document(100, 8)
    row, other = loss_by_distance(CopyModel(), letter_tokenizer(), [whole], buckets=(64, 128))
    end = whole.spans[0].end
    cut, cut_other = loss_by_distance(CopyModel(end), letter_tokenizer(), [whole], buckets=(64, 128))
    assert cut == row and cut_other.num_tokens == other.num_tokens - 7
    none, _ = loss_by_distance(CopyModel(end - 1), letter_tokenizer(), [whole], buckets=(64, 128))
    assert none.num_tokens == none.num_documents == 0 and math.isnan(none.loss)


def test_a_tiny_model_against_forwards_by_hand(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "qm_spec" / "zoo" / "novels" / "target")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        # Large weights, so that every token's loss is its own.
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    prose = "It was a dark night, and nobody had seen the red house on the hill. " * 50
    documents = list(generate_many(6, (1500, 4000), 3, [prose]))
    progress = []
    *rows, other = loss_by_distance(
        model, tokenizer, documents, buckets=(2, 64, 512, 4096), context=1, on_progress=lambda: progress.append(1)
    )
    assert len(progress) == 6
    nats, num_tokens = 0.0, 0
    for one in documents:
        ids = torch.tensor(tokenizer(one.text, add_special_tokens=False)["input_ids"])[None]
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        num_tokens += ids.shape[1] - 1
    assert sum(row.num_tokens for row in rows) + other.num_tokens == num_tokens
    assert sum(row.num_spans for row in rows) == sum(len(one.spans) for one in documents)
    assert sum(row.loss * row.num_tokens for row in (*rows, other)) == pytest.approx(nats, rel=1e-4)

    # One span alone, with 32 tokens before it: batches and padding change nothing.
    one = next(one for one in documents if one.kind == "quotation")
    chosen = [span for span in one.spans if span.distance > 1000]
    row = loss_by_distance(model, tokenizer, [Document(one.text, one.kind, tuple(chosen))], buckets=(33, 4096))[0]
    read = tokenizer(one.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, expected, counted = torch.tensor(read["input_ids"]), 0.0, 0
    for span in chosen:
        inside = [i for i, (a, b) in enumerate(read["offset_mapping"]) if a < span.end and b > span.start]
        window = ids[inside[0] - 32 : inside[-1] + 1]
        with torch.no_grad():
            logits = model(window[None]).logits[0, 31:-1]
        expected += F.cross_entropy(logits, ids[inside], reduction="sum").item()
        counted += len(inside)
    assert len(chosen) > 1 and row.num_tokens == counted
    assert row.loss_without == pytest.approx(expected / counted, rel=1e-4)


def test_bad_buckets_are_refused():
    with pytest.raises(ValueError, match=r"two increasing distances, got \[128, 64\]"):
        loss_by_distance(CopyModel(), letter_tokenizer(), [], buckets=(128, 64))
    with pytest.raises(ValueError, match=r"context must be in 1\.\.63, .* got 64"):
        loss_by_distance(CopyModel(), letter_tokenizer(), [], context=64)
