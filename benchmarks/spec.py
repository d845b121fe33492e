"""Compare speculation methods on one target: speed, acceptance, and whether the output stays the same."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import typer

ROOT = Path(__file__).resolve().parents[1]

EXAMPLES = """
Examples:

    python benchmarks/spec.py

    python benchmarks/spec.py --target MODEL --methods none,ngram --prompts questions.jsonl

    python benchmarks/spec.py --methods none,qm_spec,qm_spec-reference

    python benchmarks/spec.py --context-lengths 256,1024,3000 --concurrency 4 --out results/long

    python benchmarks/spec.py --benchmark spec_bench --data DIR --per-category 10 --stop-at-eos --target MODEL

    python benchmarks/spec.py --target MODEL --methods none,ngram,qm_spec --baseline eagle3=DIR --dtype bfloat16
"""


if __name__ == "__main__":
    if find_spec("qm_spec") is None:
        # A clone that is not installed: for this process and for the engines that it starts.
        sys.path.insert(0, str(ROOT))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    from qm_spec.cli.evaluate import evaluate

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(epilog=EXAMPLES)(evaluate)
    app()
