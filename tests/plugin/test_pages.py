"""The draft layer among layers of several kinds: how many groups vLLM makes, and that another's page serves it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.offline_engine import OFFLINE, run_offline
from support.tiny_pair import edit_json
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

import qm_spec
from qm_spec.config import MergeConfig
from qm_spec.integrations.vllm_plugin import pages
from qm_spec.integrations.vllm_plugin.attention import MergedAttention, QuickMergeBackend
from qm_spec.integrations.vllm_plugin.compat import get_kv_cache_groups
from qm_spec.ops import append_kv_, merge_groups_, merged_attention
from qm_spec.ops.page import slot_elements

pytestmark = pytest.mark.vllm

BF16 = torch.bfloat16


class TargetBackend(QuickMergeBackend):
    """A backend of the target's that leaves specs as they are and takes the layouts of FlashAttention."""


class TargetLayer(AttentionLayerBase):
    """A layer of the target, with nothing but its spec."""

    def __init__(self, spec: KVCacheSpec) -> None:
        self.spec = spec

    def get_attn_backend(self) -> type[TargetBackend]:
        return TargetBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.spec


def full(count: int, heads: int, dim: int, block: int = 16, dtype: torch.dtype = BF16) -> list[KVCacheSpec]:
    return [FullAttentionSpec(block_size=block, num_kv_heads=heads, head_size=dim, dtype=dtype)] * count


def sliding(count: int, heads: int, dim: int, window: int = 1024) -> list[KVCacheSpec]:
    sizes = {"block_size": 16, "num_kv_heads": heads, "head_size": dim, "dtype": BF16}
    return [SlidingWindowSpec(**sizes, sliding_window=window)] * count


def mamba(count: int, page_bytes: int) -> list[KVCacheSpec]:
    state = {"shapes": ((1,),), "dtypes": (BF16,), "mamba_type": "gdn_attention"}
    return [MambaSpec(block_size=544, page_size_padded=page_bytes, **state)] * count


def mla(count: int) -> list[KVCacheSpec]:
    return [MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=BF16)] * count


# Layers of the target, their tokens per page, its groups alone.
TARGETS = {
    "gpt-oss": (full(18, 8, 64) + sliding(18, 8, 64, 128), 16, 2),
    "gemma-3-27b": (full(10, 16, 128) + sliding(52, 16, 128), 16, 7),
    "qwen3-next": (full(12, 2, 256, 544) + mamba(36, 544 * 2 * 2 * 256 * 2), 544, 4),
    "llama": (full(32, 8, 128), 16, 1),
    "deepseek": (mla(61), 16, 1),
    "all sliding": (sliding(32, 8, 128), 16, 1),
}


@pytest.fixture
def log() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    pages.logger.addHandler(handler)
    pages._warn_once.cache_clear()
    yield messages
    pages.logger.removeHandler(handler)


def draft_layer(num_kv_heads: int, head_dim: int, dtype: torch.dtype = BF16) -> Any:
    """Make the draft layer without its constructor, which asks for a whole engine."""
    layer = MergedAttention.__new__(MergedAttention)
    torch.nn.Module.__init__(layer)
    sizes = {"num_kv_heads": num_kv_heads, "head_size": head_dim, "head_size_v": head_dim}
    kind = {"attn_type": AttentionType.DECODER, "attn_backend": QuickMergeBackend, "sliding_window": None}
    cache = {"kv_cache_torch_dtype": dtype, "kv_cache_dtype": "auto", "kv_sharing_target_layer_name": None}
    for name, value in {**sizes, **kind, **cache, "layer_name": "model.layers.99.attn"}.items():
        setattr(layer, name, value)
    return layer


def groups(target: list[KVCacheSpec], block: int, layer: Any, layout: str) -> list[Any]:
    """Have vLLM's worker collect the specs and vLLM's engine group them."""
    config = VllmConfig()
    config.cache_config.block_size = block
    layers = {f"model.layers.{number}.attn": TargetLayer(spec) for number, spec in enumerate(target)}
    config.compilation_config.static_forward_context = {**layers, **({layer.layer_name: layer} if layer else {})}
    specs = get_kv_cache_spec(config)
    config.cache_config.kv_cache_layout = layout
    return get_kv_cache_groups(config, specs)


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLHNC"])
@pytest.mark.parametrize(
    ("name", "heads", "dim"),
    [
        ("gpt-oss", 8, 56),
        ("gpt-oss", 4, 64),
        ("gemma-3-27b", 16, 120),
        ("gemma-3-27b", 8, 128),
        ("qwen3-next", 2, 248),
        ("llama", 8, 128),
        ("deepseek", 8, 128),
    ],
)
def test_a_target_of_several_kinds_of_layers_keeps_its_groups(
    name: str, heads: int, dim: int, layout: str, log: list[str]
) -> None:
    target, block, alone = TARGETS[name]
    assert len(groups(target, block, None, layout)) == alone
    with_ours = groups(target, block, draft_layer(heads, dim), layout)
    assert len(with_ours) <= alone + 1
    (ours,) = (group for group in with_ours if "model.layers.99.attn" in group.layer_names)
    # All tokens stay, and a page holds whole groups of ours.
    assert "model.layers.0.attn" in ours.layer_names
    assert not log


@pytest.mark.parametrize(
    ("name", "heads", "dim", "count"), [("gpt-oss", 8, 64, 37), ("qwen3-next", 2, 256, 49), ("all sliding", 8, 128, 33)]
)
def test_a_page_that_fits_nowhere_is_said_once_with_the_groups_it_costs(
    name: str, heads: int, dim: int, count: int, log: list[str]
) -> None:
    target, block, alone = TARGETS[name]
    for _ in range(2):
        assert len(groups(target, block, draft_layer(heads, dim), "LBNHC")) == count
    (message,) = log
    assert f"into {count} groups instead of {alone}" in message
    assert ("train the drafter anew" in message) == (name != "all sliding") and "VLLM_KV_CACHE_LAYOUT=BLHNC" in message


def test_a_layout_that_packs_pages_of_several_sizes_needs_no_warning(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")
    target, block, alone = TARGETS["gpt-oss"]
    assert len(groups(target, block, draft_layer(8, 64), "BLHNC")) == alone
    assert not log


MERGE = MergeConfig(window=24, group_size=8, schedule=(4, 2, 1))
SIZES = {"num_pages": 9, "page_size": 16, "heads": 2, "dim": 24}


def host_caches(layout: str, dtype: torch.dtype, host_dtype: torch.dtype) -> list[torch.Tensor]:
    """Make a target's cache as vLLM does: two layers in a buffer, filled with ones."""
    from vllm.v1.kv_cache_interface import KVCacheTensor, compute_layout_strides, create_kv_cache_views

    head_size = 40 * dtype.itemsize // host_dtype.itemsize
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=head_size, dtype=host_dtype)
    strides = compute_layout_strides(spec, SIZES["num_pages"], 2, KVCacheLayout[layout])
    size = 2 * SIZES["num_pages"] * spec.page_size_bytes
    raw = torch.ones(size, dtype=torch.int8)
    tensor = KVCacheTensor(size=size, layers=["a", "b"], layer_stride=strides[0], block_stride=strides[1], offset=0)
    return create_kv_cache_views(raw, spec, SIZES["num_pages"], KVCacheLayout[layout], tensor)


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLNHC", "BLHNC"])
@pytest.mark.parametrize(
    ("dtype", "host_dtype"), [(torch.float32, torch.float32), (BF16, BF16), (BF16, torch.uint8)], ids=str
)
def test_in_a_page_of_the_targets_the_layer_computes_what_it_does_in_its_own(
    layout: str, dtype: torch.dtype, host_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    heads, dim, page_size, num_pages = SIZES["heads"], SIZES["dim"], SIZES["page_size"], SIZES["num_pages"]
    size = num_pages, heads, page_size, slot_elements(dim, dtype) * dtype.itemsize
    own = torch.ones(size, dtype=torch.int8).view(dtype)
    neighbour, host = host_caches(layout, dtype, host_dtype)
    layer = draft_layer(heads, dim, dtype)
    layer.bind_kv_cache(own)
    assert layer.kv_cache is own
    layer.bind_kv_cache(host)
    assert layer.kv_cache.shape == own.shape and layer.kv_cache.dtype == dtype

    num_tokens = 100
    table = torch.tensor([[3, 8, 1, 5, 2, 7, 4]], dtype=torch.int32)
    positions = torch.arange(num_tokens)
    slots = table[0, positions // page_size].long() * page_size + positions % page_size
    key, value = torch.randn(2, num_tokens, heads, dim, dtype=dtype)
    query, lengths = torch.randn(5, 2 * heads, dim, dtype=dtype), torch.tensor([num_tokens], dtype=torch.int32)
    slopes, starts = torch.full((2 * heads,), 0.1), torch.tensor([0, 5], dtype=torch.int32)
    before = neighbour.clone(), host.clone()
    outputs = []
    for cache in (own, layer.kv_cache):
        append_kv_(cache, key, value, slots)
        merge_groups_(cache, table, lengths - 4, dim, MERGE)
        outputs.append(merged_attention(query, cache, table, lengths, starts, slopes, -slopes, 5, MERGE))
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(own, layer.kv_cache)
    # Neither the target's layer beside it was touched, nor a page that is not in the table.
    assert torch.equal(neighbour, before[0]) and torch.equal(host[6], before[1][6])


def test_a_page_that_is_no_run_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one run of bytes.*VLLM_KV_CACHE_LAYOUT"):
        draft_layer(2, 24, BF16).bind_kv_cache(host_caches("LHBNC", BF16, BF16)[1])


def test_a_spec_that_has_no_room_is_not_taken() -> None:
    own = replace(full(1, 2, 24)[0], state_content_bytes=112)
    (host,) = full(1, 2, 28)
    others = sliding(1, 2, 28)[0]
    assert pages.draft_spec(own, {"a": host, "b": others}) is host
    for change in ({"block_size": 32}, {"head_size": 24, "head_size_v": 24}):
        assert pages.draft_spec(own, {"a": replace(host, **change), "b": others}) is own


# On a target with sliding windows in every second layer

NOVELS = Path(qm_spec.__file__).parent / "zoo" / "novels"
WITH_GROUPS = OFFLINE.replace(
    "from vllm import LLM",
    """import vllm.v1.core.kv_cache_utils as cache
made = []
group = cache.get_kv_cache_groups
cache.get_kv_cache_groups = lambda *arguments: made.append(group(*arguments)) or made[-1]
from vllm import LLM""",
).replace('{"answers"', '{"groups": [group.layer_names for group in made[-1]], "answers"')


def write_sliding_target(folder: Path) -> Path:
    """Give the layers of the shipped target windows of 64 tokens in turn; its texts are others then."""
    shutil.copytree(NOVELS / "target", folder)
    kinds = ["full_attention", "sliding_attention"] * 10
    edit_json(folder / "config.json", layer_types=kinds, sliding_window=64)
    return folder


def write_half_drafter(folder: Path) -> Path:
    """Keep the second key/value head of the shipped drafter, so that its page fits into the target's."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(NOVELS / "drafter", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        part = name.rsplit(".")[-2 if name.endswith("weight") else -1]
        if part in ("q_proj", "k_proj", "v_proj", "slopes", "far_bias"):
            tensors[name] = tensor.chunk(2)[1].contiguous()
        elif part == "o_proj":
            tensors[name] = tensor.chunk(2, 1)[1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    edit_json(folder / "config.json", num_attention_heads=3, num_key_value_heads=1)
    return folder


@pytest.mark.usefixtures("most_drafts")
def test_a_target_with_sliding_windows_decodes_the_same_with_as_many_groups(tmp_path: Path) -> None:
    """In the target's pages as in its own the drafter proposes the same, and nothing changes what is written."""
    target, drafter = write_sliding_target(tmp_path / "target"), write_half_drafter(tmp_path / "drafter")
    prompts = [
        {"prompt_token_ids": [7 + number] * 5 + list(range(40, 40 + length))}
        for number, length in enumerate((9, 150, 300))
    ]
    request = {"prompts": prompts, "sampling": {"temperature": 0, "max_tokens": 48}}
    engine = {"model": str(target), "max_model_len": 512}
    drafting = {**engine, "speculative_config": {"model": str(drafter)}}
    in_own_pages = (
        "from qm_spec.integrations.vllm_plugin import attention\nattention.draft_spec = lambda own, target: own\n"
    )
    runs = []
    for number, (settings, program) in enumerate(
        [(engine, WITH_GROUPS), (drafting, WITH_GROUPS), (drafting, in_own_pages + WITH_GROUPS)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        runs.append(run_offline(folder, settings, [request], program))
    assert [len(run["groups"]) for run in runs] == [2, 2, 21]
    assert runs[0]["answers"] == runs[1]["answers"] == runs[2]["answers"]
    accepted = [run["counters"][0]["vllm:spec_decode_num_accepted_tokens"] for run in runs[1:]]
    assert accepted[0] == accepted[1] > 10
