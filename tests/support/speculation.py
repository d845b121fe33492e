"""Small targets, a drafter that is right as often as a test wants it, and the exact distribution of a target."""

from __future__ import annotations

import itertools

import torch
from scipy.stats import chisquare
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(vocab_size=11, scale=0.2, seed=0, **settings):
    """Return a random Llama whose distributions are neither flat nor sharp."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
        bos_token_id=None,
        **settings,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=scale)
    return model


class BareModel(nn.Module):
    """A causal module as the README may mean it: ids to logits, no cache, no config."""

    def __init__(self, vocab_size=11, width=24, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab_size, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, vocab_size)
        nn.init.normal_(self.head.weight, std=0.5)
        self.eval()

    def forward(self, token_ids):
        return self.head(self.dropout(self.rnn(self.embed(token_ids))[0]))


class BareModelWithMemory(BareModel):
    """The same, beside encoder states `[B, S, width]`."""

    def forward(self, token_ids, encoder_hidden_states):
        return super().forward(token_ids) + self.head(encoder_hidden_states.mean(1, keepdim=True))


def logits_of(module, token_ids):
    """Return `[B, T, V]` of either kind of target."""
    out = module(token_ids)
    return getattr(out, "logits", out)


class Oracle:
    """Drafts by the target itself, and errs on purpose at every `wrong_every`-th position of a row."""

    max_draft_len = None

    def __init__(self, target, wrong_every=0):
        self.module = target
        self.wrong_every = wrong_every

    def start(self, batch, capacity, hidden_states):
        return OracleRun(self, batch)


class OracleRun:
    def __init__(self, oracle, batch):
        self.oracle = oracle
        self.rows = [[] for _ in range(batch)]

    def remember(self, token_ids, states, counts):
        for row, ids, count in zip(self.rows, token_ids.tolist(), counts.tolist(), strict=True):
            row.extend(ids[:count])

    def draft(self, next_ids, num_drafts, sample):
        rows = [[*row, token] for row, token in zip(self.rows, next_ids.tolist(), strict=True)]
        for _ in range(num_drafts):
            logits = torch.stack([logits_of(self.oracle.module, torch.tensor([row]))[0, -1] for row in rows])
            for number, row in enumerate(rows):
                if self.oracle.wrong_every and len(row) % self.oracle.wrong_every == 0:
                    logits[number] = logits[number].roll(1)
            for row, token in zip(rows, sample(logits).tolist(), strict=True):
                row.append(token)
        return torch.tensor([row[-num_drafts:] for row in rows])

    def select(self, rows):
        self.rows = [self.rows[row] for row in rows.tolist()]


@torch.no_grad()
def plain_greedy(module, prompt, num_tokens):
    """Decode `[B, T]` by the module alone, one token per pass over the whole prefix."""
    ids = prompt
    for _ in range(num_tokens):
        ids = torch.cat([ids, logits_of(module, ids)[:, -1:].argmax(-1)], 1)
    return ids


@torch.no_grad()
def exact_distribution(module, prompt, num_tokens, vocab_size, temperature):
    """Return the probability of each continuation of `[1, T]`, `[V ** n]` float64 in the order of its digits."""
    continuations = torch.tensor(list(itertools.product(range(vocab_size), repeat=num_tokens)))
    ids = torch.cat([prompt.expand(len(continuations), -1), continuations], 1)
    logits = logits_of(module, ids)[:, prompt.shape[1] - 1 : -1].double()
    log_probs = torch.log_softmax(logits / temperature, -1).gather(-1, continuations.unsqueeze(-1))
    return log_probs.sum((1, 2)).exp()


def chi_squared_p_value(observed, expected):
    """Return the probability of a deviation at least this large, cells with less than 5 expected joined."""
    small = expected < 5
    observed = torch.cat([observed[~small], observed[small].sum().view(1)])
    expected = torch.cat([expected[~small], expected[small].sum().view(1)])
    keep = expected > 0
    return float(chisquare(observed[keep], expected[keep], sum_check=False).pvalue)
