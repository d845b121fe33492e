"""`qm-spec init` writes the drafter that training begins with, and says that it is untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import edit_json

from qm_spec.discovery import check_drafter
from qm_spec.drafter.checkpoint import load_drafter
from qm_spec.training.drafter import DRAFTERS, config_of, new_drafter
from qm_spec.training.settings import DrafterSettings


@pytest.fixture
def made(run: Any, target: Path, tmp_path: Path) -> Any:
    """The folder that `qm-spec init` writes."""

    def init(name: str, *arguments: object) -> Path:
        done = run("init", "--target", target, "--out", tmp_path / name, *arguments)
        assert done.exit_code == 0, done.output
        assert "UNTRAINED" in done.stdout
        return tmp_path / name

    return init


def test_it_fits_its_target_whose_weights_are_not_there(made: Any, target: Path) -> None:
    assert not list(target.glob("*.safetensors"))
    assert check_drafter(made("a"), target) == 4
    assert check_drafter(made("b", "--window", 64, "--num-speculative-tokens", 7), target) == 7


def test_it_is_what_training_begins_with(made: Any, target: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
    settings = DrafterSettings(target=target, data=[], out=tmp_path, draft_vocab_size=8)
    found = load_drafter(made("a", "--draft-vocab-size", 8))
    trained = new_drafter(DRAFTERS[0], model, config_of(settings, model, found.config.target_fingerprint), 64)
    assert {name: weight.shape for name, weight in found.state_dict().items()} == {
        name: weight.shape for name, weight in trained.state_dict().items()
    }
    for name in ("quickmerge", "eagle_aux_hidden_state_layer_ids", "lookup_length", "next_token_values"):
        assert found.config.to_dict()[name] == trained.config.to_dict()[name]


def test_a_seed_decides_the_weights(made: Any) -> None:
    first, again, other = (
        (made(name, "--seed", seed) / "model.safetensors").read_bytes() for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_a_draft_vocabulary_holds_the_tokens_that_end_an_answer(made: Any, target: Path, caplog: Any) -> None:
    edit_json(target / "config.json", eos_token_id=[30, 31])
    folder = made("a", "--draft-vocab-size", 4)
    assert load_drafter(folder).draft_token_ids.tolist() == [0, 1, 30, 31]
    check_drafter(folder, target)
    assert not caplog.records


def test_inspect_and_doctor_know_that_it_is_untrained(made: Any, run: Any, target: Path) -> None:
    folder = made("a")
    assert "UNTRAINED" in run("inspect", folder).stdout
    assert "is untrained" in run("doctor", "--target", target, "--draft", folder).stdout


def test_nothing_is_overwritten(made: Any, run: Any, target: Path) -> None:
    folder = made("a")
    before = (folder / "model.safetensors").read_bytes()
    done = run("init", "--target", target, "--out", folder, "--seed", 5)
    assert isinstance(done.exception, FileExistsError) and "choose another --out" in str(done.exception)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft-vocab-size", "33"], r"draft_vocab_size must be in 1..32"),
        (["--window", "4"], "window must be in"),
        (["--window", "24", "--num-speculative-tokens", "8"], r"num_speculative_tokens must be in 1..7"),
        (["--lookup-length", "1"], "lookup_length must be 0"),
    ],
)
def test_settings_that_make_no_sense(
    arguments: list[str], message: str, run: Any, target: Path, tmp_path: Path
) -> None:
    done = run("init", "--target", target, "--out", tmp_path / "out", *arguments)
    assert isinstance(done.exception, ValueError) and message in str(done.exception)
    assert not (tmp_path / "out").exists()
