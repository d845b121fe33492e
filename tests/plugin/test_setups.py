"""Set-ups of an engine, each with what it decodes with a drafter against without, or the sentence that refuses it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from safetensors.torch import load_file, save_file
from support.architectures import ARCHITECTURES, write_pair
from support.several_engines import run_engines
from support.tiny_pair import edit_json, run_in_vllm, write_drafter, write_target
from vllm.engine.arg_utils import EngineArgs

import qm_spec
from qm_spec.bench.environment import engine_environment
from qm_spec.integrations.vllm_plugin import register

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

NOVELS = Path(qm_spec.__file__).parent / "zoo" / "novels"
TARGET, DRAFTER = NOVELS / "target", NOVELS / "drafter"
ENGINE = {"model": str(TARGET), "max_model_len": 512}
# A greedy token of a 16-bit engine may be another one that is as likely within its rounding, in nats.
NEAR_TIE = 0.15


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, list[int]]]:
    """Four prompts of 10 to 300 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    texts = [json.loads(line)["text"] for line in (NOVELS / "prompts.jsonl").read_text().splitlines()[:4]]
    lengths = (10, 100, 200, 300)
    return [
        {"prompt_token_ids": tokenizer(text)["input_ids"][:length]} for text, length in zip(texts, lengths, strict=True)
    ]


def greedy(prompts: list[dict[str, list[int]]], num_tokens: int = 32, **more: Any) -> dict[str, Any]:
    return {"prompts": prompts, "sampling": {"temperature": 0, "max_tokens": num_tokens}, **more}


def decodes_the_same(
    folder: Path, requests: list[dict[str, Any]], drafter: str = "qm_spec", **engine: Any
) -> tuple[Any, dict[str, float]]:
    """Hold that a drafter changes nothing and has drafts accepted; return the answers and its engine's counters."""
    plain = {**ENGINE, **engine}
    plain, drafted = run_engines(folder, [plain, {**plain, "speculative_config": {"model": drafter}}], requests)
    assert plain["error"] is drafted["error"] is None
    assert drafted["answers"] == plain["answers"]
    assert drafted["counters"]["accepted_tokens"] > 0
    return plain["answers"], drafted["counters"]


@pytest.mark.long
def test_an_fp8_cache_decodes_the_same(tmp_path: Path, prompts: list[dict[str, list[int]]]) -> None:
    answers, _ = decodes_the_same(tmp_path, [greedy(prompts)], kv_cache_dtype="fp8")
    assert answers[0]


@pytest.mark.long
def test_urgent_requests_that_preempt_others_decode_the_same(
    tmp_path: Path, prompts: list[dict[str, list[int]]]
) -> None:
    """Pages for two of the four: the last, most urgent one takes those of others, which read their text anew."""
    request = greedy(prompts, 200, priority=[3, 2, 1, 0])
    pages = {"max_num_seqs": 4, "num_gpu_blocks_override": 8}
    _, counters = decodes_the_same(tmp_path, [request], scheduling_policy="priority", **pages)
    assert counters["num_preemptions"] > 0


@pytest.mark.long
def test_with_an_adapter_on_the_target_it_decodes_the_same(tmp_path: Path, prompts: list[dict[str, list[int]]]) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    answers, _ = decodes_the_same(
        tmp_path, [greedy(prompts), greedy(prompts, adapter=str(adapter))], enable_lora=True, max_lora_rank=8
    )
    assert answers[0] != answers[1]


def write_adapter(folder: Path) -> Path:
    """Write a LoRA adapter with random weights for the shipped target, as peft writes one."""
    folder.mkdir()
    config = json.loads((TARGET / "config.json").read_text())
    rank, width = 8, config["hidden_size"]
    rows = {"q_proj": width, "v_proj": config["num_key_value_heads"] * config["head_dim"]}
    torch.manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, outputs in rows.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, width) / 10
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank) / 10
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": list(rows)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.long
def test_on_two_ranks_it_decodes_the_same(tmp_path: Path) -> None:
    """A key/value head for each rank, of target and drafter."""
    llama = next(one for one in ARCHITECTURES if one.name == "LlamaForCausalLM")
    target, drafter = write_pair(tmp_path, llama)
    prompts = [{"prompt_token_ids": [(7 * place * place) % 61 + 3 for place in range(length)]} for length in (4, 90)]
    engine = {"model": str(target), "tensor_parallel_size": 2, "max_model_len": 256}
    decodes_the_same(tmp_path, [greedy(prompts, 24)], str(drafter), **engine)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["gptq", "w4a16"])
def test_a_target_of_four_bit_weights_gets_drafts_and_writes_its_own_text(
    layout: str, tmp_path: Path, prompts: list[dict[str, list[int]]]
) -> None:
    """The kernel for them is of 16 bits, where near ties flip: each token is the most likely one or as likely."""
    target = {"gptq": write_gptq, "w4a16": write_w4a16}[layout](tmp_path / "target")
    engine = {"model": str(target), "dtype": "bfloat16", "max_model_len": 512}
    asked = greedy(prompts)
    (drafted,) = run_engines(tmp_path, [{**engine, "speculative_config": {"model": str(DRAFTER)}}], [asked])
    assert drafted["error"] is None and drafted["counters"]["accepted_tokens"] > 0
    texts = [
        {"prompt_token_ids": prompt["prompt_token_ids"] + answer}
        for prompt, answer in zip(prompts, drafted["answers"][0], strict=True)
    ]
    scores = {"prompts": texts, "sampling": {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1}}
    (plain,) = run_engines(tmp_path, [engine], [scores])
    assert plain["error"] is None
    for prompt, below in zip(prompts, plain["answers"][0], strict=True):
        written = below[len(prompt["prompt_token_ids"]) :]
        assert len(written) == 32 and max(written) < NEAR_TIE


@pytest.mark.long
def test_a_target_of_eight_bit_weights_and_activations_decodes_the_same(
    tmp_path: Path, prompts: list[dict[str, list[int]]]
) -> None:
    """Each row is rounded by itself, and integers are added without rounding."""
    decodes_the_same(tmp_path, [greedy(prompts)], str(DRAFTER), model=str(write_w8a8(tmp_path / "target")))


def write_gptq(folder: Path, group_size: int = 32) -> Path:
    """Round the matrices of the shipped target to 4 bits in groups of inputs, in the format of GPTQ."""
    shutil.copytree(TARGET, folder)
    tensors = {}
    for name, weight in load_file(TARGET / "model.safetensors").items():
        if "proj" not in name:
            tensors[name] = weight
            continue
        groups = weight.float().t().reshape(-1, group_size, weight.shape[0])
        scales = groups.abs().amax(1).clamp_min(1e-6) / 7
        values = ((groups / scales[:, None]).round().clamp(-8, 7) + 8).to(torch.int64).flatten(0, 1)
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.qweight"] = pack(values.view(-1, 8, weight.shape[0]), 1)
        # The format states one less than the zero, which is 8.
        zeros = torch.full((scales.shape[0], weight.shape[0] // 8, 8), 7)
        tensors[f"{layer}.qzeros"] = pack(zeros, 2)
        tensors[f"{layer}.scales"] = scales.half()
        tensors[f"{layer}.g_idx"] = (torch.arange(weight.shape[1]) // group_size).int()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": True}
    edit_json(folder / "config.json", quantization_config=quantisation)
    return folder


def write_w4a16(folder: Path, group_size: int = 32) -> Path:
    """Round the matrices of the shipped target to 4 bits in groups of inputs, in the format of compressed-tensors."""

    def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.float().reshape(weight.shape[0], -1, group_size)
        scales = groups.abs().amax(2).clamp_min(1e-6) / 7
        values = ((groups / scales[..., None]).round().clamp(-8, 7) + 8).to(torch.int64)
        return {
            "weight_packed": pack(values.view(weight.shape[0], -1, 8), 2),
            "weight_scale": scales.bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return write_compressed(folder, compress, "pack-quantized", weights=weights)


def write_w8a8(folder: Path) -> Path:
    """Round the matrices of the shipped target to 8 bits, with a scale for each output, for activations of 8 bits."""

    def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scales = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-6) / 127
        return {"weight": (weight.float() / scales).round().to(torch.int8), "weight_scale": scales}

    common = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**common, "strategy": "channel", "dynamic": False}
    activations = {**common, "strategy": "token", "dynamic": True}
    return write_compressed(folder, compress, "int-quantized", weights=weights, input_activations=activations)


def write_compressed(
    folder: Path, compress: Callable[[torch.Tensor], dict[str, torch.Tensor]], layout: str, **scheme: dict[str, Any]
) -> Path:
    """Write the shipped target with its matrices compressed, as compressed-tensors writes one."""
    shutil.copytree(TARGET, folder)
    tensors = {}
    for name, weight in load_file(TARGET / "model.safetensors").items():
        if "proj" in name:
            layer = name.removesuffix("weight")
            tensors |= {layer + part: tensor for part, tensor in compress(weight).items()}
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
        "ignore": ["lm_head"],
    }
    edit_json(folder / "config.json", quantization_config=quantisation)
    return folder


def pack(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Pack eight values of 4 bits along a dimension into one int32."""
    shape = [1] * values.ndim
    shape[dim] = 8
    packed = (values << (4 * torch.arange(8)).view(shape)).sum(dim)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int().contiguous()


# What does not draft by us

WITHOUT_US = """
import gc, json, sys
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

job = json.load(open(sys.argv[1]))
common = {"model": job["model"], "dtype": "float32", "enforce_eager": True, "max_model_len": 128}
done = {}


def embed():
    llm = LLM(runner="pooling", convert="embed", **common)
    return [output.outputs.embedding for output in llm.embed(job["prompts"], use_tqdm=False)]


def extract():
    llm = LLM(speculative_config=job["extract"], kv_transfer_config=job["connector"], **common)
    outputs = llm.generate(job["prompts"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    return [[list(output.outputs[0].token_ids), sorted(output.kv_transfer_params)] for output in outputs]


for name, make in (("embed", embed), ("extract", extract)):
    try:
        done[name] = make()
    except Exception as error:
        done[name] = f"{type(error).__name__}: {error}"
    gc.collect()
    cleanup_dist_env_and_memory()
done["ours"] = "qm_spec.integrations.vllm_plugin.register" in sys.modules
json.dump(done, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def beside_us(tmp_path_factory: pytest.TempPathFactory, prompts: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """What vLLM makes of an embedding model and of its hidden states, with our plug-in in the process and without."""
    results = []
    for allowed in ("qm_spec", ""):
        folder = tmp_path_factory.mktemp("beside")
        job = {
            "model": str(TARGET),
            "prompts": [{"prompt_token_ids": prompt["prompt_token_ids"][:100]} for prompt in prompts],
            "extract": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [2, 10]}},
            },
            "connector": {
                "kv_connector": "ExampleHiddenStatesConnector",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": str(folder / "states")},
            },
        }
        (folder / "job.json").write_text(json.dumps(job))
        with (folder / "log").open("w") as log:
            done = subprocess.run(
                [sys.executable, "-c", WITHOUT_US, str(folder / "job.json"), str(folder / "result.json")],
                env={**engine_environment("cpu"), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": allowed},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=1800,
            )
        assert done.returncode == 0, (folder / "log").read_text()[-4000:]
        results.append(json.loads((folder / "result.json").read_text()))
    assert [result["ours"] for result in results] == [True, False]
    return results


@pytest.mark.long
def test_an_embedding_model_has_the_vectors_it_has_without_us(beside_us: list[dict[str, Any]]) -> None:
    ours, without = (torch.tensor(result["embed"]) for result in beside_us)
    assert ours.shape == (4, 192) and torch.equal(ours, without)
    # Of different texts.
    assert len(ours.unique(dim=0)) == 4


@pytest.mark.long
def test_vllms_method_that_extracts_hidden_states_runs_as_without_us(beside_us: list[dict[str, Any]]) -> None:
    """Its connector copies them by CUDA: on a CPU they are computed, and never written."""
    ours, without = (result["extract"] for result in beside_us)
    assert ours == without
    assert [len(tokens) for tokens, _ in ours] == [8] * 4
    assert all("hidden_states_path" in names for _, names in ours)


# What is refused


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A target and its drafter that are read, and not run."""
    register.register()
    target = write_target(tmp_path / "pair")
    return target, write_drafter(target / "qm_spec", target)


def make_args(target: Path, **arguments: Any) -> EngineArgs:
    return EngineArgs(model=str(target), skip_tokenizer_init=True, dtype="float32", max_model_len=128, **arguments)


def test_sleep_is_refused_by_vllm_on_a_cpu(pair: tuple[Path, Path]) -> None:
    for drafter in (None, str(pair[1])):
        with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
            make_args(pair[0], enable_sleep_mode=True, spec_model=drafter).create_engine_config()


def test_a_vllm_that_is_too_new_serves_alone_and_refuses_a_drafter(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    assert make_args(pair[0]).create_engine_config().speculative_config is None
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.32 to 0\.33, found 0\.99\.1; install vllm==0\.33"):
        make_args(pair[0], spec_model="qm_spec").create_engine_config()


CONFIGURE = """
import sys
from vllm.engine.arg_utils import EngineArgs

for drafter in ("qm_spec", sys.argv[2], None):
    runner = {"runner": "pooling", "convert": "embed"} if drafter is None else {}
    try:
        args = EngineArgs(model=sys.argv[1], dtype="float32", max_model_len=128, spec_model=drafter, **runner)
        config = args.create_engine_config()
        print("MADE", config.model_config.runner_type, getattr(config.speculative_config, "method", None))
    except ValueError as error:
        print("REFUSED", str(error).replace("\\n", " ")[:200])
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ("qm_spec", ["MADE generate eagle3", "MADE generate eagle3", "MADE pooling None"]),
        # Nothing of ours is loaded then; vLLM's error names what it does not know.
        ("another", [r"REFUSED .*'qm_spec'", "REFUSED .*'Eagle3QuickMergeForCausalLM'", "MADE pooling None"]),
    ],
)
def test_where_only_other_plug_ins_are_allowed_a_drafter_is_refused_and_all_else_starts(
    allowed: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `VLLM_PLUGINS`. An embedding model is configured as ever, with the plug-in and without."""
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run_in_vllm(CONFIGURE, tmp_path, str(TARGET), str(DRAFTER))
    lines = [line for line in done.stdout.splitlines() if line.startswith(("MADE", "REFUSED"))]
    assert len(lines) == len(expected), done.stdout[-3000:]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line
