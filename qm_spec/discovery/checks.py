"""The checks that a drafter passes before vLLM hears of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qm_spec.config import ARCHITECTURE, MergeConfig
from qm_spec.discovery.files import read_json
from qm_spec.discovery.fingerprint import target_fingerprint


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

    The weights are opened, not read: a file of the wrong length or with a broken header is found,
    a changed byte inside a tensor is not.

    Args:
        drafter: a local folder with `config.json` and `model.safetensors`.
        target: a local folder, or a hub id that transformers can find.
        num_speculative_tokens: K; None takes the drafter's own.
        revision: of the target's hub id.

    Raises:
        FileNotFoundError: the drafter, one of its files or the target is missing.
        TypeError: K is not an integer.
        ValueError: not a QuickMerge drafter, not this target's, K out of range, or a broken file.
    """
    folder = Path(drafter).expanduser()
    config = _read_config(folder)
    _check_fingerprint(folder, config.get("target_fingerprint"), target, revision)
    depth = config.get("num_speculative_tokens") if num_speculative_tokens is None else num_speculative_tokens
    depth = _check_depth(depth, _merge_config(folder, config))
    _check_weights(folder / "model.safetensors")
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
            f"but {target} has {actual}; "
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


def _check_weights(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"drafter: {file} is missing; copy the whole folder or train it again")
    from safetensors import SafetensorError, safe_open

    try:
        # Opening compares the header with the file's length and maps the tensors without reading them.
        with safe_open(file, framework="pt") as weights:
            num_tensors = len(weights.keys())
    except SafetensorError as error:
        raise ValueError(f"drafter: {file} is corrupt or truncated ({error}); copy it or train it again") from error
    if not num_tensors:
        raise ValueError(f"drafter: {file} holds no tensors; train it again")
