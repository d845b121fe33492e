"""The snippets of both original READMEs, as written there but for the import line."""

import re

import pytest
import torch
from torch import nn

QUICKMERGE = [
    """
import torch
from quickmerge import QuickMergePP

# Initialize QuickMerge++
embedding_dim = 512
quickmerge = QuickMergePP(embedding_dim=embedding_dim)

# Input embeddings [batch_size, num_tokens, embedding_dim]
X = torch.randn(2, 100, 512)
target_tokens = 20

# Compress tokens
merged_tokens, losses = quickmerge(X, target_tokens)
print(f"Compressed from {X.shape[1]} to {merged_tokens.shape[1]} tokens")
""",
    """
from quickmerge import EntropyAwareSaliency

saliency_estimator = EntropyAwareSaliency(embedding_dim=512, num_layers=12)
saliency_scores = saliency_estimator(X)  # [B, N]
""",
    """
from quickmerge import DifferentiableTokenMerging

token_merger = DifferentiableTokenMerging(temperature=0.1, epsilon=0.01)
merged_tokens, mask = token_merger(X, saliency_scores, K=20)
""",
    """
from quickmerge import BidirectionalARAlignment

ar_alignment = BidirectionalARAlignment(embedding_dim=512)
alignment_loss = ar_alignment.compute_alignment_loss(merged_tokens)
""",
    """
from quickmerge import NormBasedFidelityConstraint

fidelity_constraint = NormBasedFidelityConstraint(gamma=0.8)
fidelity_loss = fidelity_constraint.compute_fidelity_loss(X, merged_tokens)
""",
    """
from quickmerge import quickmerge_inference

# Single sequence inference
X_single = torch.randn(100, 512)  # [N, D]
ar_model = YourARModel()  # Your autoregressive model

merged_tokens, predictions = quickmerge_inference(
    X_single, 
    ar_model, 
    entropy_budget=0.2  # Compress to 20% of original tokens
)
""",
]

QUICKMERGEPP = """
import torch
from quickmergepp import QuickMergePP

num_layers, batch, seq_len, dim = 4, 2, 128, 64
h = torch.randn(num_layers, batch, seq_len, dim)

qm = QuickMergePP(dim=dim, k_max=54, temperature=0.5)
merged, info = qm.compress(h)
preds = qm.ar_predict(merged)

print(merged.shape, preds.shape)
"""


class YourARModel(nn.Module):
    """What a reader of the README puts in its place."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(512, 32)

    def forward(self, tokens):
        return self.head(tokens)


def run(snippet, names):
    exec(re.sub(r"from quickmerge(pp)? import", "from qm_spec import", snippet), names)


@pytest.fixture(scope="module")
def quickmerge():
    """The names that the snippets of the `quickmerge` README leave behind, one dict after each."""
    torch.manual_seed(0)
    names = {"YourARModel": YourARModel}
    after = []
    for snippet in QUICKMERGE:
        run(snippet, names)
        after.append(dict(names))
    return after


def test_quickmerge_quick_start(quickmerge):
    names = quickmerge[0]
    assert names["merged_tokens"].shape == (2, 20, 512)
    assert names["losses"]["total"].requires_grad


def test_quickmerge_components(quickmerge):
    saliency = quickmerge[1]["saliency_scores"]
    assert saliency.shape == (2, 100) and saliency.min() >= 0 and saliency.max() <= 1
    assert quickmerge[2]["merged_tokens"].shape == (2, 20, 512)
    assert quickmerge[2]["mask"].sum(1).tolist() == [20, 20]
    assert quickmerge[3]["alignment_loss"] > 0
    assert 0 < quickmerge[4]["fidelity_loss"] < 0.96


def test_quickmerge_inference_pipeline(quickmerge):
    assert quickmerge[5]["merged_tokens"].shape == (20, 512)
    assert quickmerge[5]["predictions"].shape == (20, 32)


def test_quickmergepp_usage(capsys):
    names = {}
    run(QUICKMERGEPP, names)
    assert capsys.readouterr().out == "torch.Size([2, 54, 64]) torch.Size([2, 54, 64])\n"
    assert names["info"]["saliency"].shape == (2, 128)
    assignments = names["info"]["assignments"]
    assert assignments.shape == (2, 128)
    assert all(set(row.tolist()) == set(range(54)) for row in assignments)


SPECULATIVE = """
import torch
from quickmergepp import create_speculative_decoder

# Create speculative decoder with QuickMerge++ compression
spec_decoder = create_speculative_decoder(
    target_model=your_model,
    vocab_size=1000,
    dim=128,
    quickmerge_dim=64,
    k_max=32,
    max_draft_len=4,
    temperature=0.8
)

# Generate with speculative decoding
generated_ids, stats = spec_decoder.generate(
    input_ids=input_tokens,
    hidden_states=encoder_hidden_states,
    max_new_tokens=50
)

print(f"Speedup: {stats['avg_speedup']:.2f}x")
print(f"Acceptance rate: {stats['acceptance_rate']:.2%}")
"""


class YourModel(nn.Module):
    """A causal model that reads token ids and encoder states."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 128)
        self.rnn = nn.GRU(128, 128, batch_first=True)
        self.head = nn.Linear(128, 1000)

    def forward(self, input_ids, encoder_hidden_states):
        return self.head(self.rnn(self.embed(input_ids))[0] + encoder_hidden_states.mean(1, keepdim=True))


@pytest.mark.parametrize("layers", [(), (4,)], ids=["one layer", "all layers"])
def test_quickmergepp_speculative_decoding(capsys, layers):
    torch.manual_seed(0)
    names = {
        "your_model": YourModel(),
        "input_tokens": torch.randint(1000, (2, 10)),
        "encoder_hidden_states": torch.randn(*layers, 2, 100, 128),
    }
    with pytest.warns(UserWarning, match="untrained"):
        run(SPECULATIVE, names)
    assert names["generated_ids"].shape == (2, 60)
    assert torch.equal(names["generated_ids"][:, :10], names["input_tokens"])
    speed, acceptance = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Speedup: \d+\.\d\dx", speed)
    assert re.fullmatch(r"Acceptance rate: \d+\.\d\d%", acceptance)
    # The reference printed "20.00%" with no token accepted.
    stats = names["stats"]
    assert stats["acceptance_rate"] == stats["accepted_tokens"] / stats["drafted_tokens"] > 0


MULTIMODAL = """
from quickmergepp import create_multimodal_pipeline, create_diffusion_pipeline, create_llm_pipeline

# Vision-Language
multimodal = create_multimodal_pipeline(vision_dim=768, text_dim=512, k_max=64)
fused_output, info = multimodal(vision_tokens, text_tokens)

# Diffusion Models
diffusion = create_diffusion_pipeline(unet_dim=768, text_dim=512, k_max=32)
compressed_text, _ = diffusion.compress_text_embeddings(text_embeddings)

# LLM Optimizations
llm = create_llm_pipeline(model_dim=4096, k_max=128)
compressed_k, compressed_v = llm.compress_kv_cache(key_cache, value_cache)
"""


def test_quickmergepp_multimodal_applications():
    torch.manual_seed(0)
    names = {
        "vision_tokens": torch.randn(2, 196, 768),
        "text_tokens": torch.randn(2, 77, 512),
        "text_embeddings": torch.randn(2, 77, 512),
        "key_cache": torch.randn(2, 512, 4, 64),
        "value_cache": torch.randn(2, 512, 4, 64),
    }
    run(MULTIMODAL, names)
    # In the reference the first two do not compress.
    assert names["fused_output"].shape == (2, 64, 256)
    assert (names["info"]["input_tokens"], names["info"]["output_tokens"]) == (273, 64)
    assert names["compressed_text"].shape == (2, 32, 512)
    assert names["compressed_k"].shape == names["compressed_v"].shape == (2, 128, 4, 64)
