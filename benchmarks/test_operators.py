"""The operators' benchmarks under pytest-benchmark, which compares with earlier runs.

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

`bench_kernels.py` measures the same plans beside their references and a copy; on a busy machine compare
there.
"""

from functools import partial

import pytest
import torch
from plans import PLANS, Plan
from pytest_benchmark.fixture import BenchmarkFixture


def _name(plan: Plan) -> str:
    case, sizes, dtype = plan
    return f"{case.name} {sizes} {dtype}".replace("torch.", "")


@pytest.mark.parametrize("plan", [plan for some in PLANS.values() for plan in some], ids=_name)
def test_operator(plan: Plan, benchmark: BenchmarkFixture) -> None:
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
