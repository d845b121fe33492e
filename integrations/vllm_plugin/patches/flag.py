"""`vllm serve TARGET --speculative-model qm_spec|DRAFT_DIR`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from qm_spec.integrations.vllm_plugin.compat import Patch

FLAG = "--speculative-model"


def with_flag(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `EngineArgs.add_cli_args` with the flag `--speculative-model`."""

    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        if FLAG not in parser._option_string_actions:  # noqa: SLF001 - argparse has no other way to ask
            group = parser.add_argument_group("qm_spec", "Speculative decoding with a QuickMerge drafter.")
            # The default stays that of --spec-model, which has the same destination.
            action = group.add_argument(
                FLAG,
                dest="spec_model",
                default=argparse.SUPPRESS,
                metavar="qm_spec|DRAFT_DIR",
                help="'qm_spec' finds the QuickMerge drafter of the served model; a folder names one.",
            )
            _keep_abbreviations(parser, action)
        return parser

    return add_cli_args


def _keep_abbreviations(parser: argparse.ArgumentParser, ours: argparse.Action) -> None:
    """Leave abbreviations that meant another flag before ours what they were: `--speculative` is one of vLLM's."""
    find = parser._get_option_tuples  # noqa: SLF001 - argparse has no other way to say it

    def find_others_first(option_string: str) -> list[Any]:
        found = find(option_string)
        return [match for match in found if match[0] is not ours] or found

    parser._get_option_tuples = find_others_first  # type: ignore[method-assign]  # noqa: SLF001


SPECULATIVE_MODEL_FLAG = Patch(
    target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
    parameters=("parser",),
    replacement=with_flag,
    why="`vllm serve TARGET --speculative-model qm_spec`; vLLM has renamed the flag to --spec-model",
    how="adds --speculative-model to each parser that lacks it, with the destination of --spec-model",
    upstream="none",
    delete_when="vLLM has a flag --speculative-model again",
)
