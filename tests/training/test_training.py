"""The trainers learn, resume where they stopped, and refuse what they cannot train on."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM
from typer.testing import CliRunner

from qm_spec.cli import app
from qm_spec.config import MergeConfig
from qm_spec.discovery import check_drafter
from qm_spec.drafter.checkpoint import load_drafter
from qm_spec.drafter.losses import distillation_loss
from qm_spec.training.data import TokenWindows, find_files, read_documents
from qm_spec.training.documents import Document, DocumentBatches
from qm_spec.training.drafter import default_aux_layers, drafter_config
from qm_spec.training.estimate import MEASURED, expected_acceptance_length
from qm_spec.training.fit import last_checkpoint
from qm_spec.training.optimizer import Muon, orthogonalize
from qm_spec.training.states import TargetStates

TEXT = "the cat sat on the mat and the dog ran to the red house while it rained on the hill. " * 200


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, and a target trained on it for a few steps."""
    base = tmp_path_factory.mktemp("training")
    (base / "text").mkdir()
    (base / "text" / "a.txt").write_text(TEXT)
    done = invoke(
        *("train-target", "--data", base / "text", "--valid", base / "text", "--out", base / "target"),
        *("--max-steps", 30, "--batch-size", 4, "--sequence-length", 64, "--hidden-size", 64, "--num-layers", 4),
        *("--intermediate-size", 128, "--vocab-size", 300, "--context", 256, "--save-steps", 30),
    )
    assert done.exit_code == 0, done.output
    return base


def arguments(folder, out, *more):
    return (
        *("train", "--target", folder / "target", "--data", folder / "text", "--out", out, "--rows-per-step", 32),
        *("--sequence-length", 96, "--rows-per-document", 16, "--window", 24, "--group-size", 8),
        *("--schedule", "4,1", "--num-speculative-tokens", 2, "--save-steps", 10, *more),
    )


def train(folder, out, *more):
    return invoke(*arguments(folder, out, *more))


def test_the_target_learns_and_says_how_it_was_made(folder):
    record = json.loads((folder / "target" / "provenance.json").read_text())["stages"][0]
    assert record["valid_loss_nats_per_token"] < 4.5, "below the entropy of 300 equal tokens (5.7) by far"
    assert record["tokens"] == 30 * 4 * 64 and len(record["data_sha256"]) == 64


def test_the_drafter_learns_and_fits_its_target(folder, tmp_path):
    done = train(folder, tmp_path / "drafter", "--max-steps", 40, "--regenerated-tokens", 3000)
    assert done.exit_code == 0, done.output
    assert check_drafter(tmp_path / "drafter", folder / "target") == 2
    record = json.loads((tmp_path / "drafter" / "provenance.json").read_text())["stages"][0]
    # On a text of one sentence even a short training predicts most tokens.
    assert record["valid_acceptance_length"] > 1.5
    assert record["regenerated_tokens"] > 0


@pytest.mark.parametrize("kind", ["eagle3", "eagle3-window"])
def test_the_same_trainer_makes_eagle3(folder, tmp_path, kind):
    done = train(folder, tmp_path / "drafter", "--drafter", kind, "--max-steps", 40, "--regenerated-tokens", 3000)
    assert done.exit_code == 0, done.output
    drafter = load_drafter(tmp_path / "drafter")
    record = json.loads((tmp_path / "drafter" / "provenance.json").read_text())["stages"][0]
    assert record["valid_acceptance_length"] > 1.5
    assert record["drafter"] == kind and record["parameters"] == drafter.num_parameters()
    # Window 24, groups of 8 as 4 and 1 entries: after 96 tokens 3 raw groups, 3 of 4, 6 of 1.
    assert drafter.config.sliding_window == {"eagle3": None, "eagle3-window": 42 - 4}[kind]
    refused = train(folder, tmp_path / "ours", "--max-steps", 2, "--init-from", tmp_path / "drafter")
    assert isinstance(refused.exception, ValueError) and "leave --init-from out" in str(refused.exception)


def test_an_unknown_drafter_is_refused(folder, tmp_path):
    refused = train(folder, tmp_path / "drafter", "--drafter", "eagle2", "--max-steps", 2)
    assert isinstance(refused.exception, ValueError) and "got 'eagle2'" in str(refused.exception)


def test_the_drafter_may_read_the_embedding(folder, tmp_path):
    done = train(folder, tmp_path / "drafter", "--aux-layers", "0,1,3", "--max-steps", 2)
    assert done.exit_code == 0, done.output
    drafter = load_drafter(tmp_path / "drafter")
    assert drafter.config.eagle_aux_hidden_state_layer_ids == [0, 1, 3]
    # The embedding is much smaller than a late layer's state, and must not be lost beside it.
    states = torch.randn(5, 3 * 64)
    smaller = torch.cat([states[:, :64] / 50, states[:, 64:]], -1)
    torch.testing.assert_close(drafter.layer.fuse(smaller), drafter.layer.fuse(states), rtol=0.01, atol=0.01)
    refused = train(folder, tmp_path / "other", "--aux-layers", "0,1,4", "--max-steps", 2)
    assert isinstance(refused.exception, ValueError) and "in 0..3, got [0, 1, 4]" in str(refused.exception)


def test_a_drafter_is_saved_with_the_lookup_that_is_asked_for(folder, tmp_path):
    done = train(folder, tmp_path / "drafter", "--lookup-length", 4, "--max-steps", 2)
    assert done.exit_code == 0, done.output
    assert load_drafter(tmp_path / "drafter").config.lookup_length == 4
    refused = train(folder, tmp_path / "other", "--lookup-length", 1, "--max-steps", 2)
    assert isinstance(refused.exception, ValueError) and "0 (no lookup) or in 2..8 tokens" in str(refused.exception)


def test_training_goes_on_from_a_drafter_of_the_same_target_only(folder, tmp_path):
    first = tmp_path / "first"
    assert train(folder, first, "--max-steps", 2).exit_code == 0
    assert train(folder, tmp_path / "second", "--max-steps", 2, "--init-from", first).exit_code == 0
    stages = json.loads((tmp_path / "second" / "provenance.json").read_text())["stages"]
    assert len(stages) == 2 and stages[0]["commit"] == stages[1]["commit"]
    edited = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps({**edited, "target_fingerprint": "f" * 16}))
    refused = train(folder, tmp_path / "third", "--max-steps", 2, "--init-from", first)
    assert isinstance(refused.exception, ValueError) and "leave --init-from out" in str(refused.exception)


def test_going_on_keeps_the_draft_vocabulary_or_chooses_it_anew(folder, tmp_path):
    first, short = tmp_path / "first", ("--max-steps", 1)
    assert train(folder, first, "--draft-vocab-size", 64, *short).exit_code == 0
    # As if it had been trained on other text.
    drafter = load_drafter(first)
    other = torch.arange(64) + 200
    drafter.draft_token_ids = other
    drafter.save_pretrained(first)
    assert train(folder, tmp_path / "kept", "--init-from", first, *short).exit_code == 0
    assert torch.equal(load_drafter(tmp_path / "kept").draft_token_ids, other)
    assert train(folder, tmp_path / "anew", "--init-from", first, "--draft-vocab-size", 64, *short).exit_code == 0
    assert not torch.equal(load_drafter(tmp_path / "anew").draft_token_ids, other)
    refused = train(folder, tmp_path / "larger", "--init-from", first, "--draft-vocab-size", 65, *short)
    assert isinstance(refused.exception, ValueError) and "has a draft vocabulary of 64 tokens" in str(refused.exception)


def test_an_interrupted_run_resumes_from_its_checkpoint(folder, tmp_path, monkeypatch):
    from qm_spec.training import drafter

    out = tmp_path / "drafter"
    kept = {}

    def crash_at_the_end(*args, **kwargs):
        kept["steps"] = sorted(p.name for p in (out / "work" / "checkpoints").iterdir())
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(drafter.QuickMergePrior, "save_pretrained", crash_at_the_end)
        assert isinstance(train(folder, out, "--max-steps", 20).exception, RuntimeError)
    assert kept["steps"] == ["checkpoint-20"]
    done = train(folder, out, "--max-steps", 25, "--resume")
    assert done.exit_code == 0, done.output
    # Steps 21 to 25 only: the log of a fresh run would begin at step 10.
    assert "step 20/25" not in done.output and "step 25/25" in done.output


DYING = """
import sys
from support.sudden_death import die_at
moment, folder, *sys.argv = [int(sys.argv[1]), sys.argv[2], "qm-spec", *sys.argv[3:]]
if moment:
    die_at(moment, folder)
from qm_spec.cli import app
app()
"""


def test_training_killed_at_random_moments_ends_with_the_weights_of_an_undisturbed_run(folder, tmp_path):
    """At file operations: while a checkpoint is written or an old one removed, and between one and the next."""
    chance, out, log = random.Random(0), tmp_path / "killed", tmp_path / "killed" / "train.log"
    asked = ("--max-steps", 30, "--regenerated-tokens", 3000, "--states", tmp_path / "states")
    assert train(folder, tmp_path / "whole", *asked).exit_code == 0

    def attempt(moment):
        """Train in a process of its own; return how it ended and the steps that it logged."""
        before = len(log.read_text().splitlines()) if log.exists() else 0
        command = [sys.executable, "-c", DYING, moment, out, *arguments(folder, out, *asked, "--resume")]
        paths = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PYTHONPATH": paths},
        )
        lines = log.read_text().splitlines()[before:] if log.exists() else []
        return done, [int(line.split()[3].partition("/")[0]) for line in lines if " step " in line]

    reached = 0
    # Of 45 operations; the first checkpoint is whole behind the 12th, and who goes on from the last has 17 left.
    for moment in (chance.randint(13, 34), chance.randint(6, 16)):
        done, steps = attempt(moment)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert all(step > reached for step in steps), "a checkpoint that is there is gone on from"
        whole = last_checkpoint(out / "work" / "checkpoints")
        now = int(whole.rpartition("-")[2]) if whole else 0
        assert now >= reached, "a checkpoint is lost"
        reached = now
    assert reached, "or nothing was gone on from"
    done, steps = attempt(0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(step > reached for step in steps)
    expected, found = (load_file(one / "model.safetensors") for one in (tmp_path / "whole", out))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_disk_that_fills_up_ends_training_with_a_sentence_and_resume_goes_on(folder, tmp_path, monkeypatch):
    """Played by a limit of a file's size, below that of the weights."""
    from qm_spec.training import drafter

    out = tmp_path / "drafter"
    with monkeypatch.context() as patch:
        # Leaves checkpoint-10.
        patch.setattr(drafter.QuickMergePrior, "save_pretrained", lambda *_, **__: sys.exit("power cut"))
        assert train(folder, out, "--max-steps", 10).exit_code == 1
    command = [
        *(sys.executable, "-m", "qm_spec", "train", "--target", folder / "target", "--data", folder / "text"),
        *(
            "--out",
            out,
            "--rows-per-step",
            "32",
            "--sequence-length",
            "96",
            "--rows-per-document",
            "16",
            "--window",
            "24",
        ),
        *("--group-size", "8", "--schedule", "4,1", "--num-speculative-tokens", "2", "--save-steps", "10"),
        *("--max-steps", "20", "--resume"),
    ]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY)),
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "File too large" in last and "--resume goes on from the last whole checkpoint" in last
    # Half of the next checkpoint is there, too; it must not be taken for one.
    assert {path.name for path in (out / "work" / "checkpoints").iterdir()} == {"checkpoint-10", "checkpoint-20"}
    resumed = train(folder, out, "--max-steps", 20, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "step 20/20" in resumed.output and "step 10/20" not in resumed.output


def test_missing_data_and_targets_are_named(folder, tmp_path):
    missing = invoke("train", "--target", folder / "target", "--data", tmp_path / "no", "--out", tmp_path / "d")
    assert isinstance(missing.exception, FileNotFoundError) and "does not exist" in str(missing.exception)
    nowhere = invoke("train", "--target", tmp_path / "no", "--data", folder / "text", "--out", tmp_path / "d")
    assert nowhere.exception is not None and "config.json" in str(nowhere.exception)


def test_the_program_ends_with_a_sentence_on_wrong_input(folder, tmp_path):
    command = [sys.executable, "-m", "qm_spec", "train", "--target", folder / "target", "--data", tmp_path / "no"]
    done = subprocess.run([*command, "--out", tmp_path / "d"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: data:") and "Traceback" not in done.stderr


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(folder, tmp_path):
    out = tmp_path / "drafter"
    command = [sys.executable, "-u", "-m", "qm_spec", "train", "--target", folder / "target"]
    command += ["--data", folder / "text", "--out", out, "--max-steps", "100000", "--rows-per-step", "4"]
    command += ["--sequence-length", "64", "--rows-per-document", "4", "--window", "24", "--group-size", "8"]
    command += ["--schedule", "4,1", "--num-speculative-tokens", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "--resume" in errors
    assert len(list((out / "work" / "checkpoints").glob("checkpoint-*/trainer_state.json"))) == 1


@pytest.mark.parametrize(
    ("kinds", "head_dim"), [(None, 64), (["full"] * 4, 64), (["full", "sliding"] * 2, 56), (["full", "linear"] * 2, 56)]
)
def test_beside_several_kinds_of_layers_heads_leave_room_for_merge_state(kinds, head_dim):
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 512}
    rest = {"num_hidden_layers": 4, "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    more = {"model_type": "of_next_year", "layer_types": kinds}
    embedding = SimpleNamespace(weight=torch.empty(32, 512))
    target = SimpleNamespace(config=SimpleNamespace(**sizes, **rest, **more), get_output_embeddings=lambda: embedding)
    config = drafter_config(target, "f" * 16, MergeConfig(), 4)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 2, head_dim)


@pytest.mark.parametrize(
    ("model_type", "sizes", "expected"),
    [
        # Experts alone, of which a token goes through two.
        ("qwen3_5_moe_text", {"moe_intermediate_size": 32, "num_experts_per_tok": 2}, {"intermediate_size": 64}),
        # Another kind of norm, without the usual name of its epsilon.
        ("cohere2_moe", {"intermediate_size": 96}, {"rms_norm_eps": 1e-6}),
        # The last layer has heads of its own; ours leave room for merge state.
        ("gemma4_text", {"global_head_dim": 48, "intermediate_size": 96}, {"head_dim": 40, "intermediate_size": 96}),
    ],
)
def test_a_config_that_lacks_a_size_or_has_several_gives_a_drafter(model_type, sizes, expected):
    shared = {"hidden_size": 64, "vocab_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    config = AutoConfig.for_model(model_type, num_hidden_layers=6, **shared, **sizes)
    embedding = SimpleNamespace(weight=torch.empty(32, 64))
    target = SimpleNamespace(config=config, get_output_embeddings=lambda: embedding)
    drafter = drafter_config(target, "f" * 16, MergeConfig(), 4)
    assert {name: getattr(drafter, name) for name in expected} == expected


def test_the_embedding_is_read_where_vllm_hands_it_out():
    assert default_aux_layers(12) == default_aux_layers(12, "llama") == [0, 8, 11]
    assert default_aux_layers(61, "deepseek_v3") == [1, 40, 60]


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="10 tokens do not fill a window of 64"):
        TokenWindows(np.arange(10, dtype=np.int32), 64)


def test_jsonl_needs_a_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"txet": "two"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 has no 'text' field"):
        list(read_documents(find_files([tmp_path])))


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (3, 40, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.3


def test_muon_leaves_frozen_and_unused_parameters_alone():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "frozen": torch.nn.Linear(4, 4)})
    model["frozen"].requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = Muon(model.named_parameters())
    model["a"](torch.randn(2, 4)).sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"a.weight", "a.bias"}


def test_more_rows_promise_more_acceptance_and_never_more_than_was_measured():
    lengths = [expected_acceptance_length(rows) for rows in (0, 10_000, 280_000, 500_000, 10**9)]
    assert lengths == sorted(lengths) and lengths[0] == 1.0
    assert lengths[2] == pytest.approx(MEASURED[0][1]) and lengths[-1] == MEASURED[-1][1]


def test_the_loss_is_zero_for_the_targets_own_distribution():
    logits = torch.randn(6, 7, dtype=torch.float64)
    assert distillation_loss(logits, logits.log_softmax(-1).float()).abs() < 1e-5


def test_the_loss_and_its_gradient_are_those_of_the_kl_divergence():
    logits, target = torch.randn(2, 6, 7).unbind()
    ours, plain = (logits.clone().requires_grad_() for _ in range(2))
    loss = 0.5 * distillation_loss(ours, target.log_softmax(-1))
    expected = 0.5 * torch.nn.functional.kl_div(plain.log_softmax(-1), target.softmax(-1), reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_drafters_share_the_states_that_are_kept(folder, tmp_path):
    shared = ("--max-steps", 4, "--regenerated-tokens", 2000, "--states", tmp_path / "states", "--data-seed", 3)
    first = train(folder, tmp_path / "first", *shared)
    assert first.exit_code == 0, first.output
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "states").rglob("*.npy")}
    second = train(folder, tmp_path / "second", "--drafter", "eagle3", "--seed", 1, *shared)
    assert second.exit_code == 0, second.output
    assert kept and kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "states").rglob("*.npy")}


def test_kept_states_are_the_targets(folder, tmp_path):
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    input_ids, everywhere = torch.randint(300, (2, 40)), torch.ones(2, 40, dtype=torch.bool)
    expected = TargetStates(target).read(input_ids, [1, 2])
    expected_logits = target(input_ids).logits.flatten(0, 1)
    torch.testing.assert_close(expected.logits(everywhere), expected_logits)
    states = TargetStates(target, tmp_path / "states")
    first, again = states.read(input_ids, [1, 2]), states.read(input_ids, [1, 2])
    torch.testing.assert_close(first.aux_states, expected.aux_states, rtol=2**-8, atol=0)
    # States are rounded to bfloat16 before the head reads them.
    torch.testing.assert_close(first.logits(everywhere), expected_logits, rtol=2**-6, atol=2**-6)
    assert torch.equal(first.aux_states, again.aux_states)
    assert torch.equal(first.logits(everywhere), again.logits(everywhere))
    one_more = states.read(input_ids, [3]).aux_states
    torch.testing.assert_close(one_more, TargetStates(target).read(input_ids, [3]).aux_states, rtol=2**-8, atol=0)
    count = len(list((tmp_path / "states").iterdir()))
    assert count == 2 * 4, "two documents of three layers and the last state"


def test_states_of_a_document_do_not_depend_on_what_it_is_padded_for(folder, tmp_path):
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    some = [Document.answered(torch.randint(300, (n,)).tolist(), [5, 6]) for n in (9, 30, 17)]
    kept = TargetStates(target, tmp_path)
    kept.keep(some, [1, 2])
    files = sorted(tmp_path.iterdir())
    batch = DocumentBatches(some, rows_per_batch=100)[0]
    reading = kept.read(batch["input_ids"], [1, 2], batch["lengths"])
    assert sorted(tmp_path.iterdir()) == files, "nothing is read twice"
    order = [int(length) for length in batch["lengths"]]
    for row, length in enumerate(order):
        ids = batch["input_ids"][row : row + 1, :length]
        alone = TargetStates(target).read(ids, [1, 2]).aux_states[0]
        torch.testing.assert_close(reading.aux_states[row, :length], alone, rtol=2**-7, atol=1e-4)


def test_a_target_that_caps_its_logits_is_learned_as_it_is(tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = Gemma2Config(
        **sizes, vocab_size=40, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8
    )
    target = Gemma2ForCausalLM(config).eval()
    input_ids = torch.randint(40, (1, 12))
    reading = TargetStates(target).read(input_ids, [1])
    everywhere = torch.ones(1, 12, dtype=torch.bool)
    torch.testing.assert_close(reading.logits(everywhere), target(input_ids).logits[0])
    with pytest.raises(ValueError, match="leave --draft-vocab-size out"):
        reading.logits(everywhere, torch.zeros(3, 16))
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM changes what its vocabulary head returns.*leave --states"):
        TargetStates(target, tmp_path).read(input_ids, [1])
    assert not list(tmp_path.iterdir()), "nothing wrong is kept"
