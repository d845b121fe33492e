"""`qm-spec compress-train`: it learns on real text, resumes, and refuses what it cannot train on."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qm_spec import NormBasedFidelityConstraint, QuickMergePP
from qm_spec.cli import app
from qm_spec.pairs import NOVELS
from qm_spec.quickmerge import TemperatureSchedule
from qm_spec.training import compressor as training
from qm_spec.training.compressor import CompressorTraining, read_states
from qm_spec.training.data import TokenWindows, read_documents, tokenize

NOVELS_TARGET, PROMPTS = NOVELS / "target", NOVELS / "prompts.jsonl"
LENGTH, KEEP, LAYER = 64, 8, 5


def train(out, *arguments):
    arguments = (
        *("compress-train", "--data", PROMPTS, "--out", out, "--layer", LAYER, "--keep", KEEP, "--batch-size", 4),
        *("--sequence-length", LENGTH, "--prior-layers", 1, "--save-steps", 10, "--lr", 0.02, *arguments),
    )
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("compressor") / "out"
    done = train(out, "--max-steps", 60)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def states():
    """Layer 5 of the held-out tail of the text, `[B, N, D]`, read with all of the target's layers."""
    tokenizer = AutoTokenizer.from_pretrained(NOVELS_TARGET)
    target = AutoModelForCausalLM.from_pretrained(NOVELS_TARGET, dtype=torch.float32).eval()
    ids = tokenize(tokenizer, read_documents([PROMPTS]))
    windows = TokenWindows(ids[-(len(ids) // 50) :], LENGTH)
    with torch.no_grad():
        ids = torch.stack([window["input_ids"] for window in windows])
        return target(ids, output_hidden_states=True).hidden_states[LAYER]


def losses_of(module, states):
    with torch.no_grad():
        _, losses = module.eval()(states)
    return {name: loss.item() for name, loss in losses.items()}


def test_every_loss_falls_on_text_that_was_not_trained_on(trained, states):
    stage = json.loads((trained / "provenance.json").read_text())["stages"][0]
    before, after = stage["valid_before"], stage["valid_after"]
    assert after["total"] < 0.85 * before["total"]
    # The selection got better, not only the prior's predictions.
    assert after["fidelity"] < 0.97 * before["fidelity"]
    assert after["alignment"] < 0.75 * before["alignment"]
    # The saved compressor is the one that was measured, and the record names what made it.
    assert losses_of(QuickMergePP.from_pretrained(trained), states) == pytest.approx(after, rel=0.01)
    assert len(stage["data_sha256"]) == len(stage["target_sha256"]) == 64
    assert (stage["layer"], stage["kept_per_window"], stage["steps"]) == (LAYER, KEEP, 60)
    assert not (trained / "checkpoints").exists()


def test_merged_tokens_do_not_collapse(trained, states):
    # Merged tokens that are all the same would be predicted perfectly. The fidelity alone makes that worse than
    # what was learned: it is the loss of the best constant, with an alignment of 0.
    constant = states.mean(1, keepdim=True).expand(-1, KEEP, -1)
    collapsed = NormBasedFidelityConstraint(0.8).compute_fidelity_loss(states, constant).item()
    module = QuickMergePP.from_pretrained(trained)
    assert losses_of(module, states)["total"] < collapsed
    merged, info = module.compress(states)
    variance = [x.float().var(1).mean().item() for x in (merged, states)]
    assert variance[0] > 0.3 * variance[1]
    assert info["sizes"].amax() < LENGTH - KEEP


def test_an_interrupted_run_resumes_with_its_step_and_temperature(tmp_path, monkeypatch):
    temperatures = []

    def crash(module, folder):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(training.QuickMergePP, "save_pretrained", crash)
        assert isinstance(train(tmp_path, "--max-steps", 20).exception, RuntimeError)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-20"]

    def record(self, step):
        temperatures.append(step)
        return 0.5

    with monkeypatch.context() as patch:
        patch.setattr(TemperatureSchedule, "__call__", record)
        done = train(tmp_path, "--max-steps", 30, "--resume")
    assert done.exit_code == 0, done.output
    # Steps 21 to 30 only, and the schedule with them.
    assert "step 20/30" not in done.output and "step 30/30" in done.output
    last = 3 * 30 // 4
    assert [step for step in temperatures if step != last] == [step for step in range(20, 30) if step != last]


def test_the_temperature_falls_while_training_and_stays_at_its_end_otherwise():
    target = AutoModelForCausalLM.from_pretrained(NOVELS_TARGET, dtype=torch.float32)
    compressor = QuickMergePP(dim=192, k_max=4, saliency="learned", prior_layers=1, input_scale=60.0)
    model = CompressorTraining(compressor, target, 0, schedule=TemperatureSchedule(1.0, 0.25, 2))
    ids = torch.arange(32).view(2, 16)
    seen = []
    for _ in range(3):
        model(ids)["loss"].backward()
        seen.append(compressor.merging.selection.temperature)
    model.eval()
    model(ids)
    assert [*seen, compressor.merging.selection.temperature] == pytest.approx([1.0, 0.5, 0.25, 0.25])
    assert not any(p.requires_grad for p in target.parameters()) and "step" in model.state_dict()
    assert all("_target" not in name for name in model.state_dict())


def test_only_the_layers_that_are_read_are_run(states):
    target = training._load_target(NOVELS_TARGET, LAYER)
    calls = []
    for layer in target.base_model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.arange(32).view(2, 16)
    exact = AutoModelForCausalLM.from_pretrained(NOVELS_TARGET, dtype=torch.float32)
    with torch.no_grad():
        hidden = exact(ids, output_hidden_states=True).hidden_states
    assert torch.equal(read_states(target, ids, LAYER), hidden[LAYER])
    assert len(calls) == LAYER + 1
    assert torch.equal(read_states(target, ids, 0), hidden[0])
    assert torch.equal(read_states(training._load_target(NOVELS_TARGET, 20), ids, 20), hidden[20])


@pytest.mark.parametrize("settings", [("--chunk-size", 16, "--keep", 2, "--causal"), ("--grouping", "kmeans")])
def test_other_settings_train_and_are_kept(tmp_path, settings):
    done = train(tmp_path, "--max-steps", 2, *settings)
    assert done.exit_code == 0, done.output
    module = QuickMergePP.from_pretrained(tmp_path)
    merged, _ = module.compress(torch.randn(1, LENGTH, 192))
    assert merged.shape == (1, 8, 192)
    assert (module.chunk_size, module.merging.grouping) == ((16, "cosine") if len(settings) == 5 else (None, "kmeans"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--target", "nowhere"), FileNotFoundError, "nowhere holds no config.json; pass the folder"),
        (("--data", "nowhere"), FileNotFoundError, "nowhere does not exist"),
        (("--layer", 21), ValueError, r"layer must be in 0\.\.20 \(0 = the embeddings\), got 21"),
        (("--sequence-length", 10**6), ValueError, "do not fill a window of 1000000"),
        (("--grouping", "nearest"), ValueError, r"one of \['cosine', 'kmeans'\], got 'nearest'"),
    ],
)
def test_wrong_input_is_refused_before_training(tmp_path, arguments, error, message):
    done = train(tmp_path / "out", "--max-steps", 1, *arguments)
    with pytest.raises(error, match=message):
        raise done.exception
    assert not (tmp_path / "out").exists()
