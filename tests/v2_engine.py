"""Run requests on an engine with vLLM's V2 runner on a CPU, whose Triton kernels are interpreted."""

from __future__ import annotations

from offline_engine import OFFLINE

# Before vLLM is imported. Its stock Triton has no CPU backend, so it is told of one that runs nothing: the interpreter
# does, in NumPy. That takes masks of integers for indices where Triton means truth values, and knows no functions of
# CUDA's library.
INTERPRETED = """
import os
os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
from types import SimpleNamespace
import triton.backends
import triton.language
from triton.language.extra import libdevice
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
from triton.runtime.interpreter import InterpreterBuilder


def with_truth_values(name, place):
    original = getattr(InterpreterBuilder, name)

    def replaced(self, *args):
        if args[place] is not None:
            args[place].data = args[place].data.astype(bool)
        return original(self, *args)

    setattr(InterpreterBuilder, name, replaced)


libdevice.log1p = lambda x: triton.language.log(1.0 + x)
with_truth_values("create_masked_load", 1)
with_truth_values("create_masked_store", 2)
"""

V2 = INTERPRETED + OFFLINE
