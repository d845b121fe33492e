"""A seed's sample is plain decoding's, whatever is drafted: verification by the numbers of positions."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.speculation import chi_squared_p_value

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from qm_spec.integrations.vllm_plugin import compat, seeds
from qm_spec.integrations.vllm_plugin.patches.cpu_expansion import CPU_EXPANSION
from qm_spec.integrations.vllm_plugin.patches.seed_numbers import SEED_NUMBERS, SEEDED_ROWS, with_numbers

pytestmark = pytest.mark.vllm

VOCABULARY, NUM_TOKENS = 50, 24


@pytest.fixture(scope="module")
def patched() -> None:
    """What a worker process on a CPU does, and our patches."""
    CpuPlatform.register_triton_kernel_overrides()
    for patch in (CPU_EXPANSION, SEEDED_ROWS, SEED_NUMBERS):
        assert compat.apply(patch)


def sampling(temperatures: list[float], generators: dict[int, torch.Generator], top_k: int | None = None) -> Any:
    size = len(temperatures)
    return SamplingMetadata(
        temperature=torch.tensor(temperatures),
        all_greedy=not any(temperatures),
        all_random=all(temperatures),
        top_p=None,
        top_k=None if top_k is None else torch.full((size,), top_k, dtype=torch.int32),
        generators=generators,
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(size),
        presence_penalties=torch.zeros(size),
        repetition_penalties=torch.ones(size),
        output_token_ids=[[] for _ in range(size)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        spec_token_ids=[[] for _ in range(size)],
    )


def drafted(drafts: list[list[int]]) -> SpecDecodeMetadata:
    """Describe rows of each request's drafts and the token behind them, one request after the other."""
    metadata = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    ends = metadata.cu_num_sampled_tokens
    is_draft = torch.ones(int(ends[-1]), dtype=torch.bool)
    is_draft[ends.long() - 1] = False
    return replace(metadata, target_logits_indices=is_draft.nonzero()[:, 0], bonus_logits_indices=ends - 1)


def logits_behind(token: int) -> torch.Tensor:
    """A target that looks at one token: `[V]`."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(token)) * 2


def decode(seed: int, drafter: Any, temperature: float = 0.8, top_k: int | None = None) -> list[int]:
    """Decode request 1 of three; `drafter` says what is drafted for it behind which text, the others have 1 draft."""
    sampler = RejectionSampler(Sampler())
    generator, text = torch.Generator().manual_seed(seed), [0]
    while len(text) <= NUM_TOKENS:
        drafts = drafter(text)
        batch = [[3], drafts, [4]]
        # The others: one without a seed, one greedy.
        metadata = drafted(batch)
        behind = [[0, 3], [text[-1], *drafts], [0, 4]]
        logits = torch.stack([logits_behind(token) for row in behind for token in row])
        settings = sampling([1.0, temperature, 0.0], {1: generator}, top_k)
        output = sampler(metadata, None, logits, settings).sampled_token_ids
        assert output[2, 0] == logits_behind(0).argmax()
        text += [token for token in output[1].tolist() if token >= 0]
    return text[1 : NUM_TOKENS + 1]


def plainly(seed: int, temperature: float = 0.8, top_k: int | None = None) -> list[int]:
    """Decode one request as vLLM does without drafts."""
    generator, text = torch.Generator().manual_seed(seed), [0]
    for _ in range(NUM_TOKENS):
        logits = logits_behind(text[-1]).unsqueeze(0)
        text.append(int(Sampler()(logits, sampling([temperature], {0: generator}, top_k)).sampled_token_ids[0, 0]))
    return text[1:]


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_sample_is_plain_decodings_whatever_is_drafted(patched: None, seed: int, top_k: int | None) -> None:
    plain = plainly(seed, top_k=top_k)
    chance = torch.Generator().manual_seed(seed)

    def right_for_some(text: list[int]) -> list[int]:
        count = int(torch.randint(0, 5, (), generator=chance))
        right = int(torch.randint(0, 5, (), generator=chance))
        ahead = plain[len(text) - 1 : len(text) - 1 + count]
        return [token if place < right else (token + 1) % VOCABULARY for place, token in enumerate(ahead)]

    for drafter in (lambda text: [], lambda text: [7], lambda text: plain[len(text) - 1 :][:4], right_for_some):
        assert decode(seed, drafter, top_k=top_k) == plain


def test_samples_of_many_seeds_have_the_targets_distribution(patched: None) -> None:
    """Chi-squared tests of a draft's position and of the next; one choice of seeds in 1000 fails each if right."""
    sampler, draft = RejectionSampler(Sampler()), int(logits_behind(0).argmax())
    generators = {row: torch.Generator().manual_seed(row) for row in range(4000)}
    metadata = drafted([[draft]] * len(generators))
    logits = torch.stack([logits_behind(0), logits_behind(draft)]).repeat(len(generators), 1)
    output = sampler(metadata, None, logits, sampling([1.0] * len(generators), generators)).sampled_token_ids
    for samples, behind in ((output[:, 0], 0), (output[output[:, 1] >= 0, 1], draft)):
        expected = logits_behind(behind).double().softmax(-1) * len(samples)
        counts = Counter(samples.tolist())
        observed = torch.tensor([counts[token] for token in range(VOCABULARY)], dtype=torch.float64)
        assert len(samples) > 500
        assert chi_squared_p_value(observed, expected) > 1e-3


def test_looking_ahead_takes_no_number() -> None:
    generator = torch.Generator().manual_seed(5)
    ahead = seeds.next_numbers(generator, 3)
    assert torch.equal(ahead, seeds.next_numbers(generator, 3))
    assert torch.equal(ahead, torch.cat([seeds.draw_numbers(generator, 1), seeds.draw_numbers(generator, 2)]))


def test_the_same_noise_makes_like_distributions_agree() -> None:
    """A draft that is sampled by the target's number is accepted more often than one that is sampled by itself."""
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0)).repeat(2000, 1)
    near = logits + 0.3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(2000)
    agree = (seeds.sample(logits, numbers) == seeds.sample(near, numbers)).double().mean()
    apart = (seeds.sample(logits, numbers) == seeds.sample(near, numbers + 5000)).double().mean()
    overlap = torch.minimum(logits[0].softmax(-1), near[0].softmax(-1)).sum()
    assert agree > 0.9 * overlap > 4 * apart


def test_other_samplers_and_requests_without_drafts_keep_vllms_way() -> None:
    calls: list[Any] = []
    forward = with_numbers(lambda *args: calls.append(args[-1]) or "vLLM's")
    generators = {0: torch.Generator()}
    settings = SimpleNamespace(generators=generators)
    usual = {"use_fp64_gumbel": False, "synthetic_mode": False, "fly_window_size": None}
    other = {"use_fp64_gumbel": True, "synthetic_mode": True, "fly_window_size": 8}
    for counts, changed in (([0, 2], None), *(([2, 0], name) for name in other)):
        sampler = SimpleNamespace(**{**usual, **({changed: other[changed]} if changed else {})})
        metadata = SimpleNamespace(num_draft_tokens=counts)
        assert forward(sampler, metadata, None, torch.empty(0), settings) == "vLLM's"
    assert all(call is settings for call in calls)
