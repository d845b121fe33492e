"""Run requests on an engine with vLLM's V2 runner on a CPU, whose Triton kernels are interpreted."""

from __future__ import annotations

from support.offline_engine import OFFLINE

# Before vLLM is imported. Its stock Triton has no CPU backend, so it is told of one that runs nothing: the interpreter
# does, in NumPy. That takes masks of integers for indices where Triton means truth values, and knows no functions of
# CUDA's library. It prepares its language anew for each call of a function, which takes longer than most of them; here
# once is enough.
INTERPRETED = """
import os
os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
from types import SimpleNamespace
import triton.backends
import triton.language
from triton.language.extra import libdevice
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
import triton.runtime.interpreter as interpreter
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
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": triton.language, "core": triton.language.core}))
interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
"""

# vLLM's noise for sampling, by the same hash at once: its 40 operations are most of what the interpreter does when
# tokens are sampled. The process ends if vLLM's own function has other numbers.
NOISE = """
import numpy as np
from vllm.v1.worker.gpu.sample import gumbel


def mix(h, key):
    key = key * np.uint32(0xCC9E2D51)
    h = h ^ (key << 15 | key >> 17) * np.uint32(0x1B873593)
    return (h << 13 | h >> 19) * np.uint32(5) + np.uint32(0xE6546B64)


def noise(seed, pos, offset):
    seed, pos, h = seed.handle.data.astype(np.int64), pos.handle.data.astype(np.int64), np.zeros(1, np.uint32)
    for key in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, pos & 0xFFFFFFFF, offset.handle.data):
        h = mix(h, key.astype(np.uint32))
    h = h ^ np.uint32(16)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> shift) * np.uint32(factor)
    h = h ^ h >> 16
    low = (h & 0xFFFF).astype(np.float32) + np.float32(0.5)
    return block((h >> 16).astype(np.float32) * np.float32(2**-16) + low * np.float32(2**-32), triton.language.float32)


def block(values, dtype):
    handle = interpreter.TensorHandle(values, dtype)
    return triton.language.tensor(handle, triton.language.block_type(dtype, [*values.shape]))


numbers = [block(np.array(values), triton.language.int64) for values in ([-3 << 40], [5 + (1 << 30)], [*range(64)])]
assert np.array_equal(noise(*numbers).handle.data, gumbel.murmur3_uniform32(*numbers).handle.data), "vLLM's noise"
gumbel.murmur3_uniform32 = noise
"""

V2 = INTERPRETED + OFFLINE
