"""The operators' benchmarks under pytest-benchmark, for its baselines, statistics and regressions.

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

`kernels.py` measures the same plans beside their references and a copy; on a machine with other work compare there.
"""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from pytest_benchmark.fixture import BenchmarkFixture

import qm_spec.ops

_NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
_OPERATORS = [name for name in _NAMES if any(operator.startswith(name) for operator in qm_spec.ops.__all__)]
_PLANS = [plan for name in _OPERATORS for plan in import_module(f"bench_{name}").PLAN]


def _name(plan: tuple[Case, Any, torch.dtype]) -> str:
    case, sizes, dtype = plan
    return f"{case.name} {sizes} {dtype}".replace("torch.", "")


@pytest.mark.parametrize("plan", _PLANS, ids=_name)
def test_operator(plan: tuple[Case, Any, torch.dtype], benchmark: BenchmarkFixture) -> None:
    """Time one operator at one size."""
    case, sizes, dtype = plan
    torch.manual_seed(0)
    arguments = case.arguments(sizes, dtype)
    run = partial(case.operator, *arguments)
    benchmark.group = case.name
    with torch.no_grad():
        if case.restore is None:
            benchmark(run)
        else:
            # A call changes its arguments, which is undone before the next one, untimed.
            benchmark.pedantic(run, setup=partial(case.restore, *arguments), rounds=21, warmup_rounds=1)
