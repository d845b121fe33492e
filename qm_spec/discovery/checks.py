"""The checks that a drafter passes before vLLM hears of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from qm_spec.config import ARCHITECTURE, MOST_DRAFTS, MergeConfig
from qm_spec.discovery.files import read_json, shown
from qm_spec.discovery.fingerprint import end_token_ids, target_fingerprint, target_sizes
from qm_spec.discovery.weights import open_weights

logger = logging.getLogger(__name__)

# Far above every model that there is; what is within them must also be in the file of weights.
_LARGEST = {
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "vocab_size": 2**24,
}
_NUM_AUX_LAYERS, _LAST_LAYER = 3, 2**16


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

    The weights are opened, not read, but for the draft vocabulary: a file of the wrong length, with a broken header or
    with fewer weights than config.json asks for is found, a changed byte inside a tensor is not. A draft vocabulary
    without the tokens that end an answer works, and a warning says what it costs.

    Args:
        drafter: a local folder with `config.json` and `model.safetensors`.
        target: a local folder, or a hub id that transformers can find.
        num_speculative_tokens: K; None takes the drafter's own.
        revision: of the target's hub id.

    Raises:
        FileNotFoundError: the drafter, one of its files or the target is missing.
        TypeError: K is not an integer.
        ValueError: not a QuickMerge drafter, one with code of its own, not this target's, a size or K out of range, a
            broken file, or a draft vocabulary that is none.
    """
    folder = Path(drafter).expanduser()
    config = _read_config(folder)
    _check_fingerprint(folder, config.get("target_fingerprint"), target, revision)
    _check_sizes(folder, config, target_sizes(target, revision))
    depth, token_ids = _check_depth_and_weights(folder, config, num_speculative_tokens)
    if token_ids is not None:
        _warn_of_missing_ends(folder, token_ids, target, revision)
    return depth


def check_folder(drafter: str | Path) -> dict[str, Any]:
    """Return the config of a drafter that passes all checks of `check_drafter` but those with its target.

    Args:
        drafter: a local folder with `config.json` and `model.safetensors`.

    Raises:
        FileNotFoundError: the drafter or one of its files is missing.
        TypeError: its K is not an integer.
        ValueError: as for `check_drafter`.
    """
    folder = Path(drafter).expanduser()
    config = _read_config(folder)
    _check_sizes(folder, config, {})
    _check_depth_and_weights(folder, config, None)
    return config


def _check_depth_and_weights(
    folder: Path, config: dict[str, Any], num_speculative_tokens: int | None
) -> tuple[int, Collection[int] | None]:
    """Return K and the token ids of the draft vocabulary, None where there is none."""
    depth = config.get("num_speculative_tokens") if num_speculative_tokens is None else num_speculative_tokens
    depth = _check_depth(depth, _merge_config(folder, config))
    weights = folder / "model.safetensors"
    return depth, _check_weights(weights, _num_weights(config), *_vocabulary_sizes(folder, config))


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
        raise FileNotFoundError(f"drafter: expected a folder, {shown(folder)} is none")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"drafter: {shown(folder)} holds no config.json, so it is no drafter")
    config = read_json(folder / "config.json")
    if not _is_ours(config):
        raise ValueError(
            f"drafter: {shown(folder)} is not a QuickMerge drafter: its architecture must be {ARCHITECTURE}, "
            f"got {config.get('architectures')!r}"
        )
    if "auto_map" in config:
        # transformers would run it where the target's code is trusted.
        raise ValueError(
            f"drafter: {shown(folder)}/config.json names code of its own (auto_map), which no QuickMerge drafter has; "
            "do not use it, or take the entry out if you made it yourself"
        )
    return config


def _check_sizes(folder: Path, config: dict[str, Any], of_target: Mapping[str, int]) -> None:
    """Refuse sizes that no drafter of this target has, before anything is allocated by them."""

    def refuse(name: str, expected: str) -> NoReturn:
        raise ValueError(
            f"drafter: {shown(folder)}/config.json: {name} must be {expected}, got {config.get(name)!r}; train it again"
        )

    for name, largest in _LARGEST.items():
        size = config.get(name)
        if type(size) is not int or not 1 <= size <= largest:
            refuse(name, f"an integer in 1..{largest}")
    for name, size in of_target.items():
        if config[name] != size:
            refuse(name, f"the target's {size}")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        refuse("num_key_value_heads", f"a divisor of num_attention_heads ({config['num_attention_heads']})")
    if config.get("num_hidden_layers", 1) != 1:
        refuse("num_hidden_layers", "1")
    layers = config.get("eagle_aux_hidden_state_layer_ids")
    if not (
        isinstance(layers, list)
        and all(type(layer) is int and 0 <= layer <= _LAST_LAYER for layer in layers)
        and len(layers) == len(set(layers)) == _NUM_AUX_LAYERS
    ):
        refuse("eagle_aux_hidden_state_layer_ids", f"{_NUM_AUX_LAYERS} different layers of the target")


def _num_weights(config: dict[str, Any]) -> int:
    """Return how many weights the projections alone have that the sizes ask for."""
    width, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    # Fusion and entry; queries and outputs; keys and values; the MLP.
    return width * (5 * width + 3 * queries + 2 * keys + 3 * config["intermediate_size"])


def _merge_config(folder: Path, config: dict[str, Any]) -> MergeConfig:
    try:
        return MergeConfig.from_dict(config["quickmerge"])
    except KeyError as error:
        raise ValueError(f"drafter: {shown(folder)}/config.json has no entry {error}; train it again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"drafter: {shown(folder)}/config.json, entry quickmerge: {error}") from error


def _check_fingerprint(folder: Path, stated: Any, target: str | Path, revision: str | None) -> None:
    actual = target_fingerprint(target, revision)
    if stated != actual:
        raise ValueError(
            f"drafter: {shown(folder)} was trained for the target with fingerprint {shown(stated)}, "
            f"but {shown(target)} has {actual}: its sizes or its tokenizer differ; "
            f"train one for it: qm-spec train --target {shown(target)} --data PATH --out DIR"
        )


def _check_depth(depth: Any, merge: MergeConfig) -> int:
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise TypeError(f"num_speculative_tokens must be an integer, got {depth!r}")
    limit = merge.max_speculative_tokens
    if not 1 <= depth <= limit:
        raise ValueError(
            f"num_speculative_tokens must be in 1..{limit} for this drafter (window {merge.window} - group "
            f"{merge.group_size} - 1, so that only verified tokens are merged, and at most {MOST_DRAFTS}), got {depth}"
        )
    return depth


def _vocabulary_sizes(folder: Path, config: dict[str, Any]) -> tuple[int | None, int | None]:
    """Return the sizes of the draft vocabulary and of the target's; the first is None where they are the same."""
    size, vocab_size = config.get("draft_vocab_size"), config.get("vocab_size")
    if size is None or size == vocab_size:
        return None, vocab_size
    if type(size) is not int or type(vocab_size) is not int or not 1 <= size < vocab_size:
        raise ValueError(
            f"drafter: {shown(folder)}/config.json: draft_vocab_size must be an integer in 1..vocab_size "
            f"({vocab_size}), got {size!r}; train it again"
        )
    return size, vocab_size


def _check_weights(
    file: Path, num_weights: int, draft_vocab_size: int | None, vocab_size: int | None
) -> Collection[int] | None:
    """Return the token ids of the draft vocabulary, None where there is none."""
    name = shown(file)
    with open_weights(file) as weights:
        names = set(weights.keys())
        found_weights = sum(math.prod(weights.get_slice(key).get_shape()) for key in names)
        offsets = weights.get_tensor("d2t") if "d2t" in names else None
    if not names:
        raise ValueError(f"drafter: {name} holds no tensors; train it again")
    if found_weights < num_weights:
        raise ValueError(
            f"drafter: {name} must hold at least {num_weights} weights for the sizes in config.json, got "
            f"{found_weights}; the two files are not of one drafter"
        )
    found = None if offsets is None else list(offsets.shape)
    if found != (None if draft_vocab_size is None else [draft_vocab_size]):
        expected = f"d2t of {draft_vocab_size} tokens" if draft_vocab_size else "no d2t, for the whole vocabulary"
        raise ValueError(
            f"drafter: {name} must hold {expected}, as draft_vocab_size in config.json says, got "
            f"{'none' if found is None else f'd2t of shape {found}'}; the two files are not of one drafter"
        )
    if offsets is None or vocab_size is None:
        return None
    from qm_spec.drafter.vocabulary import check_token_ids, to_token_ids

    try:
        return set(check_token_ids(to_token_ids(offsets.long()), vocab_size).tolist())
    except ValueError as error:
        raise ValueError(f"drafter: {name}: {error}; train it again") from error


def _warn_of_missing_ends(folder: Path, token_ids: Collection[int], target: str | Path, revision: str | None) -> None:
    missing = sorted(set(end_token_ids(target, revision)) - set(token_ids))
    if missing:
        logger.warning(
            "qm_spec: the draft vocabulary of %s lacks %s, with which answers of %s end: outputs are right, but the "
            "step at the end of each answer accepts fewer tokens",
            shown(folder),
            f"token {missing[0]}" if len(missing) == 1 else f"tokens {missing}",
            shown(target),
        )
