"""The line that says at an engine's start what drafts, how, and what is lost."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.plugin_doubles import make_model

from qm_spec.integrations.vllm_plugin import proposer, register, status
from qm_spec.integrations.vllm_plugin.session import DraftSession

pytestmark = pytest.mark.vllm


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """Return a drafter and an engine's configuration, as they are when the cache is there."""

    def make(device: str = "cpu", kernels: str = "compiled", v2: bool = False, **settings: Any) -> tuple[Any, Any]:
        monkeypatch.setattr(status.backend, "backend", lambda device="cpu": kernels)
        monkeypatch.setattr(proposer, "get_tensor_model_parallel_world_size", lambda: settings.get("ranks", 1))
        monkeypatch.setattr(status, "graph_sizes", lambda vllm_config: [1, 2, 8])
        monkeypatch.setattr(platform, "machine", lambda: settings.get("machine", "x86_64"))
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: dict.fromkeys(settings.get("instructions", ()), True)
        )
        config = SimpleNamespace(
            device_config=SimpleNamespace(device_type=device),
            use_v2_model_runner=v2,
            model_config=SimpleNamespace(model="the/target", dtype=settings.get("dtype", torch.float32)),
            parallel_config=SimpleNamespace(data_parallel_size=1),
            speculative_config=SimpleNamespace(
                draft_model_config=SimpleNamespace(model="a/drafter\n"),
                enable_adaptive_verification=settings.get("verifies_adaptively", False),
            ),
        )
        model = make_model()
        model.model.attn.count_groups = lambda: (2, 3)
        model.session = DraftSession(model, config, 4, 16, lookup_length=3, adapts=True)
        model.session.captures = settings.get("captures")
        return model, config

    return make


def test_one_line_tells_all(engine: Callable[..., tuple[Any, Any]], plugin_log: list[logging.LogRecord]) -> None:
    status.tell_status(*engine())
    (record,) = plugin_log
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "qm_spec: target the/target, drafter 'a/drafter\\n', runner V1, loop ours, kernels compiled (cpu), "
        "graphs none, lookup from 3 tokens, K 4 (by lookup up to 16), drafts where they pay, KV groups 2, "
        "with the drafter 3, draft vocabulary 200 of 200, refused by vLLM min_p and logit_bias"
    )


@pytest.mark.parametrize(
    ("settings", "facts", "losses"),
    [
        (
            {"device": "cuda", "kernels": "reference"},
            {"kernels": "reference (cuda)", "loop": "vLLM's", "lookup": "not here", "graphs": "none"},
            ["QM_SPEC_CUDA=1", "without CUDA graphs", "there are no compiled kernels"],
        ),
        ({"device": "cuda"}, {"graphs": "up to 8 requests", "drafts": "in every step"}, []),
        ({"kernels": "reference"}, {"loop": "ours"}, ["pip install"]),
        ({"dtype": torch.bfloat16}, {"loop": "ours"}, ["multiplies bfloat16 slowly", "--dtype float32"]),
        ({"dtype": torch.bfloat16, "instructions": ["avx512_f"]}, {}, ["multiplies bfloat16 slowly"]),
        ({"dtype": torch.bfloat16, "instructions": ["avx512_f", "avx512_bf16"]}, {}, []),
        ({"dtype": torch.bfloat16, "instructions": ["amx_bf16"]}, {}, []),
        ({"dtype": torch.float16, "machine": "aarch64"}, {}, []),
        ({"dtype": torch.bfloat16, "device": "cuda"}, {}, []),
        ({"ranks": 2}, {"loop": "vLLM's"}, ["several ranks of tensor parallelism"]),
        ({"v2": True, "captures": True, "device": "cuda"}, {"runner": "V2", "loop": "ours", "graphs": "full"}, []),
        ({"v2": True, "captures": False}, {"graphs": "none", "lookup": "from 3 tokens"}, []),
        ({"v2": True}, {"loop": "vLLM's"}, ["did not take our speculator"]),
    ],
)
def test_what_is_lost_is_a_warning_with_the_way_out(
    engine: Callable[..., tuple[Any, Any]],
    settings: dict[str, Any],
    facts: dict[str, str],
    losses: list[str],
    plugin_log: list[logging.LogRecord],
) -> None:
    told = status.status_of(*engine(**settings))
    assert told.facts.items() >= facts.items()
    text = "; ".join(told.losses)
    assert all(loss in text for loss in losses) and bool(told.losses) == bool(losses)
    told.tell()
    (record,) = plugin_log
    assert record.levelno == (logging.WARNING if losses else logging.INFO) and text in record.getMessage()


def test_an_engine_starts_without_its_line(
    engine: Callable[..., tuple[Any, Any]], plugin_log: list[logging.LogRecord]
) -> None:
    model, config = engine()
    model.model.attn.count_groups = lambda: 1 / 0
    status.tell_status(model, config)
    (record,) = plugin_log
    assert record.levelno == logging.WARNING and record.exc_info


def test_what_the_package_says_reaches_vllms_log(plugin_log: list[logging.LogRecord]) -> None:
    """Such as kernels that do not load: `qm_spec` has no handler of its own."""
    register.register()
    logging.getLogger("qm_spec.ops.backend").info("kernels")
    assert [record.getMessage() for record in plugin_log] == ["kernels"]


def test_shared_answers_are_told_with_their_memory_and_where_there_are_none(
    engine: Callable[..., tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QM_SPEC_RESPONSES", "64")
    shared = status.status_of(*engine())
    assert shared.facts["lookup"] == "from 3 tokens and in 64 MiB of shared answers" and not shared.losses
    (loss,) = status.status_of(*engine(v2=True, captures=True)).losses
    assert loss.startswith("QM_SPEC_RESPONSES is set, but no answers are shared")


def test_with_v2_drafts_are_where_they_pay_if_vllm_verifies_adaptively(engine: Callable[..., tuple[Any, Any]]) -> None:
    for adaptive, told in ((True, "where they pay"), (False, "in every step")):
        assert status.status_of(*engine(v2=True, captures=True, verifies_adaptively=adaptive)).facts["drafts"] == told
