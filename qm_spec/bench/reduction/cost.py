"""What a reduced context costs: time of prefill and decoding, bytes of keys and values, peak memory."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qm_spec.bench.reduction import Method
from qm_spec.bench.reduction.language_model import WHOLE, Context, ReducedLanguageModel, run_name, tokens_kept

Row = dict[str, Any]
# glibc's M_MMAP_THRESHOLD: allocations from this size on go back to the system when they are freed.
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 65536


@dataclass(frozen=True)
class PairedTimes:
    """Times of an action and of the baseline right before it, ms, in the order of measurement."""

    action_ms: list[float]
    baseline_ms: list[float]

    @property
    def ratio_quartiles(self) -> tuple[float, float, float]:
        """Quartiles of action / baseline over the pairs; the median is the second."""
        ratios = [own / base for own, base in zip(self.action_ms, self.baseline_ms, strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, median, high


def time_in_pairs(
    baseline: Callable[[], object],
    actions: Mapping[str, Callable[[], object]],
    repeats: int,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, PairedTimes]:
    """Time each action with the baseline beside it, round by round.

    On a machine that others use, a pair meets the same load and its ratio stands; milliseconds do not.

    Args:
        baseline: what the others are held against.
        actions: by name; each is called once more before, to warm up.
        repeats: rounds, at least 1.
        on_progress: called after each pair.
    """
    times: dict[str, PairedTimes] = {name: PairedTimes([], []) for name in actions}
    baseline()
    for action in actions.values():
        action()
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].baseline_ms.append(_elapsed_ms(baseline))
            times[name].action_ms.append(_elapsed_ms(action))
            on_progress()
    return times


def _elapsed_ms(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - begin)


def peak_bytes(action: Callable[[], object]) -> int | None:
    """Return the process's peak memory during an action above its memory at rest; None outside Linux.

    The kernel's high-water mark is reset before. Freed memory is given back to the system first, and
    from then on at once, so that an earlier action's memory does not hide what this one needs.
    """
    marks = Path("/proc/self/clear_refs")
    if platform.system() != "Linux" or not marks.exists():
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.malloc_trim(0)
    marks.write_text("5")
    at_rest = _status_bytes("VmRSS")
    action()
    return _status_bytes("VmHWM") - at_rest


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"peak_bytes: /proc/self/status has no {field}")


def measure_costs(
    model: ReducedLanguageModel,
    context_ids: Tensor,
    methods: Iterable[Method],
    ratios: Iterable[float],
    *,
    repeats: int = 5,
    decode_steps: int = 8,
    seed: int = 0,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Measure every method and ratio against the whole context, `1x`, which is the first row.

    Prefill is the context up to the logits at its last token, the reduction included. Decoding is one
    token at a time after it. Peak memory is that of a prefill and the first decode step.

    Args:
        model: reads and reduces.
        context_ids: `[1, C]` int64.
        methods: see `qm_spec.bench.reduction.METHODS`.
        ratios: C / K, above 1.
        repeats: pairs of each; `on_progress` is called after each pair of prefills and of decodes.
        decode_steps: of each timed decode.
        seed: of the methods that draw.

    Returns:
        rows with `prefill_ms` and `decode_ms_per_token` (medians), the quartiles of their ratios to
        `1x` in the same pair, `kv_bytes` and `peak_bytes`, each with its ratio to `1x`.
    """
    num_tokens = context_ids.shape[1]
    names: dict[str, tuple[Method, float]] = {run_name(m.name, r): (m, r) for m in methods for r in ratios}

    def prefill(name: str | None) -> Callable[[], Context]:
        if name is None:
            return lambda: model.prefill(context_ids, None, num_tokens)[0]
        method, ratio = names[name]
        return lambda: model.prefill(context_ids, method.make(seed), tokens_kept(num_tokens, ratio))[0]

    def decode(context: Context, num_steps: int = decode_steps) -> None:
        copy = context.copy()
        for _ in range(num_steps):
            model.extend(copy, context_ids[:, :1])

    contexts = {name: prefill(name)() for name in (None, *names)}
    kv_bytes = {name: context.kv_bytes for name, context in contexts.items()}
    prefills = time_in_pairs(prefill(None), {name: prefill(name) for name in names}, repeats, on_progress)
    decodes = time_in_pairs(
        partial(decode, contexts[None]), {name: partial(decode, contexts[name]) for name in names}, repeats, on_progress
    )
    # What rests in memory must not be handed to the actions measured next.
    contexts.clear()
    peaks = {name: peak_bytes(lambda name=name: decode(prefill(name)(), 1)) for name in (None, *names)}  # type: ignore[misc]
    whole_bytes, whole_peak = kv_bytes[None], peaks[None]
    rows: list[Row] = [
        {
            "method": WHOLE,
            "ratio": 1.0,
            "num_kept": num_tokens,
            "prefill_ms": statistics.median(ms for pair in prefills.values() for ms in pair.baseline_ms),
            "decode_ms_per_token": statistics.median(ms for pair in decodes.values() for ms in pair.baseline_ms)
            / decode_steps,
            "kv_bytes": whole_bytes,
            "peak_bytes": whole_peak,
        }
    ]
    for name, (method, ratio) in names.items():
        peak = peaks[name]
        rows.append(
            {
                "method": method.name,
                "ratio": ratio,
                "num_kept": tokens_kept(num_tokens, ratio),
                "prefill_ms": statistics.median(prefills[name].action_ms),
                "prefill_ratio_quartiles": prefills[name].ratio_quartiles,
                "decode_ms_per_token": statistics.median(decodes[name].action_ms) / decode_steps,
                "decode_ratio_quartiles": decodes[name].ratio_quartiles,
                "kv_bytes": kv_bytes[name],
                "kv_ratio": kv_bytes[name] / whole_bytes,
                "peak_bytes": peak,
                "peak_ratio": peak / whole_peak if peak is not None and whole_peak else None,
            }
        )
    return rows
