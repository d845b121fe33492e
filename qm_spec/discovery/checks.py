"""The checks that a drafter passes before vLLM hears of it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qm_spec.config import ARCHITECTURE, MergeConfig
from qm_spec.discovery.files import read_json, target_file
from qm_spec.discovery.fingerprint import target_fingerprint

logger = logging.getLogger(__name__)


def is_drafter(folder: str | Path) -> bool:
    """Say whether a path is a local folder whose config.json names the QuickMerge architecture."""
    try:
        return _is_ours(read_json(Path(folder).expanduser() / "config.json"))
    except (OSError, RuntimeError, ValueError):
        # RuntimeError: `~name` of an unknown user.
        return False


def _is_ours(config: dict[str, Any]) -> bool:
    architectures = config.get("architectures")
    return isinstance(architectures, list) and ARCHITECTURE in architectures


def check_drafter(
    drafter: str | Path,
    target: str | Path,
    num_speculative_tokens: int | None = None,
    revision: str | None = None,
) -> int:
    """Return the speculative depth K after checking that this drafter can serve this target.

    The weights are opened, not read, but for the draft vocabulary: a file of the wrong length or with a broken header
    is found, a changed byte inside a tensor is not. A draft vocabulary without the tokens that end an answer works, and
    a warning says what it costs.

    Args:
        drafter: a local folder with `config.json` and `model.safetensors`.
        target: a local folder, or a hub id that transformers can find.
        num_speculative_tokens: K; None takes the drafter's own.
        revision: of the target's hub id.

    Raises:
        FileNotFoundError: the drafter, one of its files or the target is missing.
        TypeError: K is not an integer.
        ValueError: not a QuickMerge drafter, not this target's, K out of range, a broken file, or a draft vocabulary
            that is none.
    """
    folder = Path(drafter).expanduser()
    config = _read_config(folder)
    _check_fingerprint(folder, config.get("target_fingerprint"), target, revision)
    depth = config.get("num_speculative_tokens") if num_speculative_tokens is None else num_speculative_tokens
    depth = _check_depth(depth, _merge_config(folder, config))
    token_ids = _check_weights(folder / "model.safetensors", *_vocabulary_sizes(folder, config))
    if token_ids is not None:
        _warn_of_missing_ends(folder, token_ids, target, revision)
    return depth


def vllm_settings(drafter: Path, num_speculative_tokens: int | None) -> dict[str, Any]:
    """Return the entries of vLLM's `speculative_config` that name a drafter and its depth.

    Args:
        drafter: its folder.
        num_speculative_tokens: K; None leaves it to the plug-in, which knows the device.

    Raises:
        FileNotFoundError: the drafter or its config.json is missing.
        ValueError: not a QuickMerge drafter.
    """
    values_tell_next = _read_config(drafter.expanduser()).get("next_token_values", False)
    depth = {} if num_speculative_tokens is None else {"num_speculative_tokens": num_speculative_tokens}
    return {
        "method": "eagle3",
        "model": str(drafter.expanduser().absolute()),
        **depth,
        # vLLM drops the last cached block of a prefix, because what an EAGLE drafter caches depends on the next
        # token, which may be another request's. Our keys do not, and values only where they tell that token.
        "disable_eagle_block_drop": not values_tell_next,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"drafter: expected a folder, {folder} is none")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"drafter: {folder} holds no config.json, so it is no drafter")
    config = read_json(folder / "config.json")
    if not _is_ours(config):
        raise ValueError(
            f"drafter: {folder} is not a QuickMerge drafter: its architecture must be {ARCHITECTURE}, "
            f"got {config.get('architectures')}"
        )
    return config


def _merge_config(folder: Path, config: dict[str, Any]) -> MergeConfig:
    try:
        return MergeConfig.from_dict(config["quickmerge"])
    except KeyError as error:
        raise ValueError(f"drafter: {folder}/config.json has no entry {error}; train it again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"drafter: {folder}/config.json, entry quickmerge: {error}") from error


def _check_fingerprint(folder: Path, stated: Any, target: str | Path, revision: str | None) -> None:
    actual = target_fingerprint(target, revision)
    if stated != actual:
        raise ValueError(
            f"drafter: {folder} was trained for the target with fingerprint {stated}, "
            f"but {target} has {actual}: its sizes or its tokenizer differ; "
            f"train one for it: qm-spec train --target {target} --data PATH --out DIR"
        )


def _check_depth(depth: Any, merge: MergeConfig) -> int:
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise TypeError(f"num_speculative_tokens must be an integer, got {depth!r}")
    limit = merge.max_speculative_tokens
    if not 1 <= depth <= limit:
        raise ValueError(
            f"num_speculative_tokens must be in 1..{limit} for this drafter (window {merge.window} - group "
            f"{merge.group_size} - 1, so that only verified tokens are merged), got {depth}"
        )
    return depth


def _vocabulary_sizes(folder: Path, config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the sizes of the draft vocabulary and of the target's; the first is None where they are the same."""
    size, vocab_size = config.get("draft_vocab_size"), config.get("vocab_size")
    if size is None or size == vocab_size:
        return None, vocab_size
    if type(size) is not int or type(vocab_size) is not int or not 1 <= size < vocab_size:
        raise ValueError(
            f"drafter: {folder}/config.json: draft_vocab_size must be an integer in 1..vocab_size "
            f"({vocab_size}), got {size!r}; train it again"
        )
    return size, vocab_size


def _check_weights(file: Path, draft_vocab_size: int | None, vocab_size: int | None) -> Collection[int] | None:
    """Return the token ids of the draft vocabulary, None where there is none."""
    if not file.is_file():
        raise FileNotFoundError(f"drafter: {file} is missing; copy the whole folder or train it again")
    from safetensors import SafetensorError, safe_open

    try:
        # Opening compares the header with the file's length and maps the tensors without reading them.
        with safe_open(file, framework="pt") as weights:
            names = set(weights.keys())
            offsets = weights.get_tensor("d2t") if "d2t" in names else None
    except SafetensorError as error:
        raise ValueError(f"drafter: {file} is corrupt or truncated ({error}); copy it or train it again") from error
    if not names:
        raise ValueError(f"drafter: {file} holds no tensors; train it again")
    found = None if offsets is None else list(offsets.shape)
    if found != (None if draft_vocab_size is None else [draft_vocab_size]):
        expected = f"d2t of {draft_vocab_size} tokens" if draft_vocab_size else "no d2t, for the whole vocabulary"
        raise ValueError(
            f"drafter: {file} must hold {expected}, as draft_vocab_size in config.json says, got "
            f"{'none' if found is None else f'd2t of shape {found}'}; the two files are not of one drafter"
        )
    if offsets is None or vocab_size is None:
        return None
    from qm_spec.drafter.vocabulary import check_token_ids, to_token_ids

    try:
        return set(check_token_ids(to_token_ids(offsets.long()), vocab_size).tolist())
    except ValueError as error:
        raise ValueError(f"drafter: {file}: {error}; train it again") from error


def _warn_of_missing_ends(folder: Path, token_ids: Collection[int], target: str | Path, revision: str | None) -> None:
    missing = sorted(set(_end_token_ids(target, revision)) - set(token_ids))
    if missing:
        logger.warning(
            "qm_spec: the draft vocabulary of %s lacks %s, with which answers of %s end: outputs are right, but the "
            "step at the end of each answer accepts fewer tokens",
            folder,
            f"token {missing[0]}" if len(missing) == 1 else f"tokens {missing}",
            target,
        )


def _end_token_ids(target: str | Path, revision: str | None) -> list[int]:
    """Return the tokens that end the target's answers, none where it names none."""
    for name in ("generation_config.json", "config.json"):
        try:
            values = read_json(target_file(target, name, revision))
        except (FileNotFoundError, ValueError):
            continue
        ends = values.get("eos_token_id", (values.get("text_config") or {}).get("eos_token_id"))
        if ends is not None:
            return ends if isinstance(ends, list) else [ends]
    return []
