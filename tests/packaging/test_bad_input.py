"""Wrong input is refused before an engine starts, with a message that says the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: run ./install.sh")

from support.tiny_pair import NUM_WEIGHTS, edit_json, write_drafter, write_json, write_target

import qm_spec
from qm_spec.config import ARCHITECTURE
from qm_spec.discovery import check_drafter, find_drafter, search, target_fingerprint

# window 32 - group 8 - 1
DEEPEST = 23


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture
def drafter(tmp_path: Path, target: Path) -> Path:
    return write_drafter(tmp_path / "drafter", target)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of drafters and an empty zoo, whatever the machine holds."""
    monkeypatch.setenv("QM_SPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(search, "ZOO", tmp_path / "zoo")
    return tmp_path / "home"


# The target


def test_a_target_without_config(target: Path) -> None:
    (target / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"target holds no config\.json"):
        target_fingerprint(target)


def test_a_target_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder here, .* gave no config\.json"):
        target_fingerprint(tmp_path / "nowhere")


def test_a_target_without_tokenizer(target: Path) -> None:
    (target / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer: expected tokenizer\.json or one of"):
        target_fingerprint(target)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff"])
def test_a_target_with_an_unreadable_config(content: str, target: Path) -> None:
    (target / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"config\.json (is not readable JSON|must hold a JSON object)"):
        target_fingerprint(target)


# A missing drafter


def test_no_drafter_names_the_three_places_and_the_command(target: Path, home: Path, tmp_path: Path) -> None:
    write_drafter(search.ZOO / "novels" / "drafter", write_target(tmp_path / "other", hidden_size=128))
    with pytest.raises(FileNotFoundError) as caught:
        qm_spec.speculative_config(target)
    message, at_home = str(caught.value), home / target_fingerprint(target)
    for part in (
        f"\n  {target / 'qm_spec'}\n",
        f"\n  {at_home}\n",
        f"\n  {search.ZOO}/*/drafter (for other targets: novels)\n",
        f"qm-spec train --target {target} --data PATH --out {at_home}",
    ):
        assert part in message


def test_the_command_of_the_message_can_be_pasted(tmp_path: Path) -> None:
    target = write_target(tmp_path / "a target")
    with pytest.raises(FileNotFoundError, match=f"--target '{target}'"):
        find_drafter(target)


def test_a_drafter_folder_that_is_missing(target: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        check_drafter(tmp_path / "none", target)


# A wrong drafter


def test_a_folder_without_config_is_no_drafter(target: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        check_drafter(tmp_path, target)


@pytest.mark.parametrize("architectures", [["LlamaForCausalLMEagle3"], [], ARCHITECTURE, None])
def test_a_model_of_another_kind(architectures: Any, drafter: Path, target: Path) -> None:
    edit_json(drafter / "config.json", architectures=architectures)
    with pytest.raises(ValueError, match=f"not a QuickMerge drafter: its architecture must be {ARCHITECTURE}"):
        check_drafter(drafter, target)


def test_a_config_that_is_cut_off(drafter: Path, target: Path) -> None:
    text = (drafter / "config.json").read_text()
    (drafter / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="is not readable JSON"):
        check_drafter(drafter, target)


@pytest.mark.parametrize(
    "quickmerge",
    [
        *(None, 3, {"window": "32"}, {"widnow": 32}, {"window": 4}, {"window": 2**21}, {"window": 64.0}),
        *({"schedule": 1}, {"schedule": [4.5]}, {"schedule": []}, {"doublings": 17}, {"temperature": float("inf")}),
        {"window": 2**20, "group_size": 2**19},
        {"window": 512, "group_size": 256, "schedule": list(range(17, 0, -1))},
    ],
    ids=str,
)
def test_settings_of_the_merged_cache_that_make_no_sense(quickmerge: Any, drafter: Path, target: Path) -> None:
    edit_json(drafter / "config.json", quickmerge=quickmerge)
    with pytest.raises(ValueError, match=r"config\.json.*quickmerge"):
        check_drafter(drafter, target)


@pytest.mark.parametrize(
    ("size", "value", "expected"),
    [
        ("hidden_size", 2**40, "an integer in 1..131072"),
        ("hidden_size", "64", "an integer in 1..131072"),
        ("hidden_size", 128, "the target's 64"),
        ("vocab_size", 2**30, "an integer in 1..16777216"),
        ("vocab_size", 64, "the target's 32"),
        ("intermediate_size", -1, "an integer in 1..1048576"),
        ("num_attention_heads", 2**20, "an integer in 1..4096"),
        ("num_key_value_heads", 0, "an integer in 1..4096"),
        ("num_key_value_heads", 3, r"a divisor of num_attention_heads \(4\)"),
        ("head_dim", None, "an integer in 1..4096"),
        ("head_dim", True, "an integer in 1..4096"),
        ("num_hidden_layers", 1000, "1"),
        ("eagle_aux_hidden_state_layer_ids", [0, 1, 10**9], "3 different layers"),
        ("eagle_aux_hidden_state_layer_ids", [1, 1, 2], "3 different layers"),
        ("eagle_aux_hidden_state_layer_ids", list(range(1000)), "3 different layers"),
        ("eagle_aux_hidden_state_layer_ids", "0", "3 different layers"),
    ],
)
def test_a_size_that_no_drafter_of_the_target_has(
    size: str, value: Any, expected: str, drafter: Path, target: Path
) -> None:
    edit_json(drafter / "config.json", **{size: value})
    with pytest.raises(ValueError, match=f"{size} must be {expected}.*got .*train it again"):
        check_drafter(drafter, target)


@pytest.mark.parametrize("size", ["intermediate_size", "head_dim", "num_attention_heads"])
def test_sizes_for_which_the_file_holds_too_few_weights(size: str, drafter: Path, target: Path) -> None:
    edit_json(drafter / "config.json", **{size: 4096})
    with pytest.raises(ValueError, match=rf"must hold at least \d+ weights .*got {NUM_WEIGHTS}; .* not of one drafter"):
        check_drafter(drafter, target)


def test_a_drafter_with_code_of_its_own(drafter: Path, target: Path) -> None:
    edit_json(drafter / "config.json", auto_map={"AutoConfig": "theirs.Config"})
    for use in (lambda: check_drafter(drafter, target), lambda: qm_spec.discovery.vllm_settings(drafter, 4)):
        with pytest.raises(ValueError, match=r"names code of its own \(auto_map\)"):
            use()


def test_a_name_cannot_break_the_line_of_a_message(tmp_path: Path, target: Path) -> None:
    folder = tmp_path / "drafter\n2026 INFO all is well\x1b[1A"
    for prepare in (
        lambda: None,
        folder.mkdir,
        lambda: (folder / "config.json").write_text("{"),
        lambda: (folder / "config.json").write_text(f'{{"architectures": ["{ARCHITECTURE}"]}}'),
        lambda: edit_json(folder / "config.json", target_fingerprint="1\n2"),
        lambda: edit_json(folder / "config.json", target_fingerprint=target_fingerprint(target)),
    ):
        prepare()
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            check_drafter(folder, target)
        assert str(caught.value).isprintable()
        assert r"drafter\n2026 INFO all is well\x1b[1A" in str(caught.value)


# Tokens 0, 2, 5 and 31 of 32.
D2T = [0, 1, 3, 28]


def test_a_draft_vocabulary_that_is_one_passes(tmp_path: Path, target: Path) -> None:
    assert check_drafter(write_drafter(tmp_path / "d", target, D2T, draft_vocab_size=4), target) == 4


@pytest.mark.parametrize(
    ("d2t", "size", "message"),
    [
        (D2T, 0, r"draft_vocab_size must be an integer in 1\.\.vocab_size \(32\), got 0"),
        (D2T, 33, "got 33"),
        (D2T, "4", "got '4'"),
        (None, 4, "must hold d2t of 4 tokens.*got none"),
        (D2T, 5, r"must hold d2t of 5 tokens.*shape \[4\]"),
        (D2T, 32, "must hold no d2t, for the whole vocabulary"),
        (D2T, None, "must hold no d2t"),
        ([0, 1, 3, 29], 4, r"in 0\.\.31.*in 0\.\.32"),
        ([-1, 1, 3, 28], 4, r"in -1\.\.31"),
        ([0, 1, 0, 28], 4, "must rise"),
    ],
)
def test_a_draft_vocabulary_that_fits_neither_weights_nor_target(
    d2t: list[int] | None, size: Any, message: str, tmp_path: Path, target: Path
) -> None:
    drafter = write_drafter(tmp_path / "d", target, d2t, draft_vocab_size=size)
    with pytest.raises(ValueError, match=message):
        check_drafter(drafter, target)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("ends", "missing"),
    [(2, None), (31, None), ([2, 5], None), (None, None), (7, "lacks token 7"), ([1, 5, 3], r"lacks tokens \[1, 3\]")],
)
def test_a_draft_vocabulary_without_the_end_of_answers_works_with_a_warning(
    file: str, ends: Any, missing: str | None, tmp_path: Path, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = write_drafter(tmp_path / "d", target, D2T, draft_vocab_size=4)
    if file == "generation_config.json":
        # It counts where both say something.
        edit_json(target / "config.json", eos_token_id=9 if ends is not None else 2)
        write_json(target / file, {"eos_token_id": ends})
    elif ends is not None:
        edit_json(target / file, eos_token_id=ends)
    check_drafter(drafter, target)
    if missing is None:
        assert not caplog.records
    else:
        assert re.search(missing, caplog.text) and "outputs are right" in caplog.text


def test_the_drafter_of_another_target(drafter: Path, tmp_path: Path, target: Path) -> None:
    other = write_target(tmp_path / "other", words="hgfedcba")
    with pytest.raises(ValueError, match="fingerprint") as caught:
        check_drafter(drafter, other)
    for part in (target_fingerprint(target), target_fingerprint(other), f"qm-spec train --target {other}"):
        assert part in str(caught.value)


def test_a_drafter_that_names_no_target(drafter: Path, target: Path) -> None:
    edit_json(drafter / "config.json", target_fingerprint=None)
    with pytest.raises(ValueError, match="fingerprint None"):
        check_drafter(drafter, target)


# K


@pytest.mark.parametrize("depth", [-1, 0, DEEPEST + 1, 1000])
def test_a_depth_out_of_range(depth: int, drafter: Path, target: Path) -> None:
    with pytest.raises(ValueError, match=rf"in 1\.\.{DEEPEST} .*window 32 - group 8 - 1.*got {depth}"):
        check_drafter(drafter, target, depth)


@pytest.mark.parametrize("depth", [1, DEEPEST])
def test_the_limits_of_the_depth_are_allowed(depth: int, drafter: Path, target: Path) -> None:
    assert check_drafter(drafter, target, depth) == depth


def test_a_wide_window_allows_no_endless_drafts(drafter: Path, target: Path) -> None:
    wide = {"window": 2**20, "group_size": 8, "schedule": [4, 2, 1]}
    edit_json(drafter / "config.json", quickmerge=wide, num_speculative_tokens=10**6)
    with pytest.raises(ValueError, match=r"in 1\.\.256 .*at most 256.*got 1000000"):
        check_drafter(drafter, target)
    assert check_drafter(drafter, target, 256) == 256


@pytest.mark.parametrize("depth", ["4", 4.0, True])
def test_a_depth_that_is_no_integer(depth: Any, drafter: Path, target: Path) -> None:
    with pytest.raises(TypeError, match="must be an integer"):
        check_drafter(drafter, target, depth)


def test_a_drafter_without_a_depth_of_its_own(drafter: Path, target: Path) -> None:
    edit_json(drafter / "config.json", num_speculative_tokens=None)
    with pytest.raises(TypeError, match="got None"):
        check_drafter(drafter, target)
    assert check_drafter(drafter, target, 2) == 2


# The weights


def test_missing_weights(drafter: Path, target: Path) -> None:
    (drafter / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        check_drafter(drafter, target)


def cut(keep: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:keep]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": cut(0),
    "cut in the length": cut(4),
    "cut in the header": cut(20),
    "cut in the tensors": cut(2 * NUM_WEIGHTS),
    "one byte short": cut(-1),
    "one byte too many": lambda content: content + b"\0",
    "header overwritten": lambda content: content[:8] + b"\xff" * 16 + content[24:],
    "zeros of the right length": lambda content: bytes(len(content)),
    "git-lfs pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_corrupt_or_truncated_weights(damage: Callable[[bytes], bytes], drafter: Path, target: Path) -> None:
    file = drafter / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt or truncated .*train it again"):
        check_drafter(drafter, target)


def test_a_file_of_weights_without_weights(drafter: Path, target: Path) -> None:
    from safetensors.torch import save_file

    save_file({}, drafter / "model.safetensors")
    with pytest.raises(ValueError, match="holds no tensors"):
        check_drafter(drafter, target)


# The same through vLLM's own arguments, and what only vLLM knows


ONE_OF_EACH = {
    "data_parallel_size": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "decode_context_parallel_size": 1,
}


def ask(
    target: Path,
    architecture: str = "LlamaForCausalLM",
    parallel: dict[str, int] | None = None,
    **arguments: Any,
) -> Any:
    """Have vLLM make its speculative configuration, as it does while it builds an engine's."""
    from vllm.engine.arg_utils import EngineArgs

    from qm_spec.integrations.vllm_plugin.register import register

    register()
    model_config = SimpleNamespace(model=str(target), revision=None, architecture=architecture)
    parallel_config = SimpleNamespace(**{**ONE_OF_EACH, **(parallel or {})})
    return EngineArgs(model=str(target), **arguments).create_speculative_config(model_config, parallel_config)


@pytest.mark.vllm
class TestThroughVllm:
    @pytest.mark.parametrize("way", ["spec_model", "speculative_config"])
    def test_no_drafter(self, way: str, target: Path) -> None:
        value = "qm_spec" if way == "spec_model" else {"method": "eagle3", "model": "qm_spec"}
        with pytest.raises(FileNotFoundError, match="qm-spec train --target"):
            ask(target, **{way: value})

    @pytest.mark.parametrize("way", ["spec_model", "speculative_config"])
    def test_the_drafter_of_another_target(self, way: str, drafter: Path, tmp_path: Path) -> None:
        value = str(drafter) if way == "spec_model" else {"model": str(drafter), "num_speculative_tokens": 2}
        with pytest.raises(ValueError, match="was trained for the target with fingerprint"):
            ask(write_target(tmp_path / "other", hidden_size=128), **{way: value})

    def test_a_wrong_drafter_beside_the_target(self, target: Path, tmp_path: Path) -> None:
        write_drafter(target / "qm_spec", write_target(tmp_path / "other", hidden_size=128))
        with pytest.raises(ValueError, match="was trained for the target with fingerprint"):
            ask(target, spec_model="qm_spec")

    @pytest.mark.parametrize("depth", [0, DEEPEST + 1])
    @pytest.mark.parametrize("way", ["flag", "config"])
    def test_a_depth_out_of_range(self, way: str, depth: int, drafter: Path, target: Path) -> None:
        arguments: dict[str, Any] = {"spec_model": str(drafter), "spec_tokens": depth}
        if way == "config":
            arguments = {"speculative_config": {"model": str(drafter), "num-speculative-tokens": depth}}
        with pytest.raises(ValueError, match=rf"must be in 1\.\.{DEEPEST} .*got {depth}"):
            ask(target, **arguments)

    def test_truncated_weights(self, drafter: Path, target: Path) -> None:
        file = drafter / "model.safetensors"
        file.write_bytes(file.read_bytes()[:NUM_WEIGHTS])
        with pytest.raises(ValueError, match="corrupt or truncated"):
            ask(target, spec_model=str(drafter))

    @pytest.mark.parametrize("method", ["ngram", "draft_model"])
    def test_another_method(self, method: str, drafter: Path, target: Path) -> None:
        with pytest.raises(ValueError, match=f"runs as method 'eagle3', got '{method}'"):
            ask(target, spec_model=str(drafter), spec_method=method)

    @pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MambaForCausalLM"])
    def test_a_target_without_auxiliary_hidden_states(self, architecture: str, drafter: Path, target: Path) -> None:
        with pytest.raises(ValueError, match=f"{architecture} gives out no auxiliary hidden states"):
            ask(target, architecture, spec_model=str(drafter))

    @pytest.mark.parametrize(
        "option", ["decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"]
    )
    def test_a_parallel_set_up_that_the_drafter_does_not_know(self, option: str, drafter: Path, target: Path) -> None:
        with pytest.raises(ValueError, match=f"{option} must be 1 .*got 2"):
            ask(target, parallel={option: 2}, spec_model=str(drafter))

    @pytest.mark.parametrize(
        "architecture", ["DeepseekV3ForCausalLM", "MistralLarge3ForCausalLM", "KimiK25ForConditionalGeneration"]
    )
    def test_layer_0_of_a_target_that_cannot_hand_it_out(self, architecture: str, target: Path, tmp_path: Path) -> None:
        drafter = write_drafter(tmp_path / "d", target, eagle_aux_hidden_state_layer_ids=[0, 3, 5])
        with pytest.raises(ValueError, match=f"layer 0 .*vLLM's {architecture} .*--aux-layers 1,3,5"):
            ask(target, architecture, spec_model=str(drafter))

    @pytest.mark.parametrize("size", [3, 5, 6])
    def test_ranks_that_share_no_heads(self, size: int, target: Path, tmp_path: Path) -> None:
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
        drafter = write_drafter(tmp_path / "d", target, **sizes)
        with pytest.raises(ValueError, match=f"divide the drafter's 4 key/value heads or be a multiple.*got {size}"):
            ask(target, parallel={"tensor_parallel_size": size}, spec_model=str(drafter))

    def test_the_v1_runner_on_rocm(self, drafter: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.platforms import current_platform

        monkeypatch.setattr(current_platform, "is_rocm", lambda: True)
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        with pytest.raises(ValueError, match=r"on ROCm .*VLLM_USE_V2_MODEL_RUNNER=1"):
            ask(target, spec_model=str(drafter))
        assert ask(target) is None, "a user who did not ask for us must not be stopped"

    def test_a_connector_of_pages(self, drafter: Path, target: Path) -> None:
        from vllm.config import KVTransferConfig

        connector = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
        for option in ({"kv_transfer_config": connector}, {"kv_offloading_size": 1.0}):
            with pytest.raises(ValueError, match="changes pages that a connector assumes immutable"):
                ask(target, spec_model=str(drafter), **option)

    @pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.9.1", "1.32.0", "0.1.dev1+g0", "unknown"])
    def test_an_unsupported_vllm(
        self, version: str, drafter: Path, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from qm_spec.integrations.vllm_plugin import compat

        monkeypatch.setattr(compat, "vllm_version", lambda: version)
        with pytest.raises(RuntimeError) as caught:
            ask(target, spec_model=str(drafter))
        assert str(caught.value).endswith(f"supports vLLM 0.32 to 0.33, found {version}; install vllm==0.33.*")
        assert ask(target) is None, "a user who did not ask for us must not be stopped"

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc1", "0.33.2.dev3+gabc"])
    def test_a_supported_vllm(self, version: str) -> None:
        from qm_spec.integrations.vllm_plugin import compat

        assert compat.is_supported(version)
