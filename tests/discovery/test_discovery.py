"""Fingerprints of targets, and where and how a drafter is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: run ./install.sh")

from support.tiny_pair import edit_json, write_drafter, write_target

import qm_spec
from qm_spec.discovery import find_drafter, search, target_fingerprint


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of drafters and an empty zoo, whatever the machine holds."""
    monkeypatch.setenv("QM_SPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(search, "ZOO", tmp_path / "zoo")
    return tmp_path / "home"


@pytest.mark.parametrize("name", ["stories260K", "bitllama-3M"])
def test_a_model_saved_again_by_transformers_keeps_its_fingerprint(
    name: str, shared: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    model = shared(f"models/{name}")
    AutoConfig.from_pretrained(model).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() != (model / "config.json").read_text()
    assert target_fingerprint(tmp_path) == target_fingerprint(model)


def test_a_fingerprint_is_16_hex_digits_and_stays_what_shipped_drafters_state(target: Path) -> None:
    # A change of this value orphans every drafter that was ever trained.
    assert target_fingerprint(target) == "765c5053ab98f6b7"
    assert target_fingerprint(str(target)) == target_fingerprint(target)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 128},
        {"intermediate_size": 256},
        {"num_hidden_layers": 7},
        {"num_attention_heads": 2},
        {"num_key_value_heads": 1},
        {"head_dim": 32},
        {"vocab_size": 64},
        {"rope_theta": 500000.0},
        {"hidden_act": "gelu"},
        {"model_type": "mistral"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_architecture_has_another_fingerprint(change: dict[str, Any], target: Path) -> None:
    before = target_fingerprint(target)
    edit_json(target / "config.json", **change)
    assert target_fingerprint(target) != before


def test_what_does_not_define_the_function_does_not_count(target: Path) -> None:
    before = target_fingerprint(target)
    edit_json(
        target / "config.json",
        dtype="bfloat16",
        torch_dtype="bfloat16",
        transformers_version="0.0",
        _name_or_path="elsewhere",
        use_cache=False,
        attn_implementation="sdpa",
        max_position_embeddings=1024,
        eos_token_id=[1, 2],
        quantization_config={"quant_method": "fp8"},
    )
    (target / "generation_config.json").write_text('{"temperature": 0.1}')
    assert target_fingerprint(target) == before


@pytest.mark.parametrize(
    "spelling",
    [
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    ],
    ids=lambda spelling: next(iter(spelling)),
)
def test_a_default_may_be_stated_or_left_out(spelling: dict[str, Any], target: Path) -> None:
    edit_json(target / "config.json", num_key_value_heads=None, head_dim=None)
    before = target_fingerprint(target)
    edit_json(target / "config.json", **spelling)
    assert target_fingerprint(target) == before


def test_a_model_whose_layers_differ_in_size_has_a_fingerprint(tmp_path: Path) -> None:
    # In Gemma 4 heads of full attention have another size; transformers refuses to name one for all layers.
    sizes = {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "num_hidden_layers": 4}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    one, same, other = (
        write_target(tmp_path / str(number), **sizes, **kinds, global_head_dim=32, head_dim=head_dim)
        for number, head_dim in enumerate((16, 16, 64))
    )
    assert target_fingerprint(one) == target_fingerprint(same) != target_fingerprint(other)


def test_a_model_type_that_transformers_does_not_know_has_a_fingerprint(target: Path) -> None:
    edit_json(target / "config.json", model_type="of_next_year")
    before = target_fingerprint(target)
    edit_json(target / "config.json", hidden_size=128)
    assert target_fingerprint(target) != before


def test_names_of_other_families_are_understood(target: Path) -> None:
    # GPT-2 calls its width n_embd.
    sizes = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50257}
    (target / "config.json").write_text(json.dumps(sizes))
    before = target_fingerprint(target)
    edit_json(target / "config.json", n_embd=128)
    assert target_fingerprint(target) != before


def test_the_language_model_inside_a_multimodal_one_counts(target: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    text = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    (target / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    before = target_fingerprint(target)
    # Saving leaves out what equals a default, such as the vocabulary's size, and adds other keys.
    AutoConfig.from_pretrained(target).save_pretrained(target)
    assert target_fingerprint(target) == before
    edit_json(target / "config.json", text_config={**text, "hidden_size": 128})
    assert target_fingerprint(target) != before


def test_another_tokenizer_has_another_fingerprint(tmp_path: Path) -> None:
    names = [
        target_fingerprint(write_target(tmp_path / words, words=words))
        for words in ("abcdefgh", "abcdefhg", "abcdefghi")
    ]
    assert len(set(names)) == 3


def test_an_added_token_counts_and_the_layout_of_tokenizer_json_does_not(target: Path) -> None:
    file = target / "tokenizer.json"
    before = target_fingerprint(target)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "version": "9", "truncation": None}, indent=7, sort_keys=True))
    assert target_fingerprint(target) == before
    edit_json(file, added_tokens=[{"id": 8, "content": "<new>"}])
    assert target_fingerprint(target) != before


def test_both_spellings_of_merges_are_one_tokenizer(target: Path) -> None:
    file = target / "tokenizer.json"
    names = []
    for merges in ([["a", "b"]], ["a b"], [["a", "c"]]):
        edit_json(file, model={"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": merges})
        names.append(target_fingerprint(target))
    assert names[0] == names[1] != names[2]


def test_a_unigram_vocabulary_counts_by_its_order(target: Path) -> None:
    names = set()
    for vocabulary in ([["a", 0.0], ["b", -1.0]], [["b", -1.0], ["a", 0.0]]):
        edit_json(target / "tokenizer.json", model={"type": "Unigram", "vocab": vocabulary})
        names.add(target_fingerprint(target))
    assert len(names) == 2


def test_other_vocabulary_files_stand_in_for_tokenizer_json(target: Path) -> None:
    (target / "tokenizer.json").unlink()
    names = set()
    for content in (b"one", b"two"):
        (target / "tokenizer.model").write_bytes(content)
        names.add(target_fingerprint(target))
    assert len(names) == 2


def test_a_hub_id_is_read_from_the_cache_of_transformers(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils

    asked = []

    def cached_file(name: str, file: str, revision: str | None = None) -> str:
        asked.append((name, file, revision))
        if not (target / file).is_file():
            raise OSError(f"{name} has no {file}")
        return str(target / file)

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    assert target_fingerprint("org/model", "v1") == target_fingerprint(target)
    assert ("org/model", "config.json", "v1") in asked
    write_drafter(target / "qm_spec", target)
    assert find_drafter("org/model") == target / "qm_spec"


def test_the_drafter_beside_the_target_comes_first(target: Path, home: Path) -> None:
    name = target_fingerprint(target)
    shipped = write_drafter(search.ZOO / "tiny" / "drafter", target)
    assert find_drafter(target) == shipped
    at_home = write_drafter(home / name, target)
    assert find_drafter(target) == at_home
    beside = write_drafter(target / "qm_spec", target)
    assert find_drafter(target) == beside


def test_the_zoo_is_searched_by_fingerprint(target: Path, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", hidden_size=128)
    write_drafter(search.ZOO / "a" / "drafter", other)
    wanted = write_drafter(search.ZOO / "b" / "drafter", target)
    assert find_drafter(target) == wanted


def test_an_empty_folder_is_no_drafter(target: Path, home: Path) -> None:
    (target / "qm_spec").mkdir()
    at_home = write_drafter(home / target_fingerprint(target), target)
    assert find_drafter(target) == at_home


def test_the_home_defaults_to_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QM_SPEC_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert search.drafter_home() == tmp_path / ".cache" / "qm_spec"


def test_speculative_config_is_what_vllm_needs(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_drafter(target / "qm_spec", target, num_speculative_tokens=3)
    # A relative path must stay right in a worker that starts in another folder.
    monkeypatch.chdir(target.parent)
    assert qm_spec.speculative_config("target") == {
        "method": "eagle3",
        "model": str(target / "qm_spec"),
        "disable_eagle_block_drop": True,
    }
    assert qm_spec.speculative_config(target, 7)["num_speculative_tokens"] == 7
    edit_json(target / "qm_spec" / "config.json", next_token_values=True)
    assert qm_spec.speculative_config(target)["disable_eagle_block_drop"] is False


def test_a_moved_pair_still_belongs_together(target: Path, tmp_path: Path) -> None:
    write_drafter(target / "qm_spec", target)
    shutil.copytree(target, tmp_path / "copy")
    assert qm_spec.speculative_config(tmp_path / "copy")["model"] == str(tmp_path / "copy" / "qm_spec")


def test_importing_the_package_and_discovery_loads_nothing_heavy() -> None:
    code = "import qm_spec, qm_spec.discovery, sys; print(sorted({'transformers', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
