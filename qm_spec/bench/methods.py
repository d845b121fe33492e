"""The methods that a benchmark compares. Each is one record here; everything else looks it up by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qm_spec.bench.environment import engine_environment
from qm_spec.discovery.checks import check_drafter, is_drafter, vllm_settings
from qm_spec.discovery.files import read_json
from qm_spec.discovery.fingerprint import target_fingerprint
from qm_spec.drafter.suffix_index import MOST_LIKELY, SURE_LENGTH

REFERENCE_METHOD = "none"
# Plain decoding measured a second time: what differs between the two is the noise floor.
NOISE_METHOD = "none-again"

# Where a method's drafter comes from: the target's own, or a folder that is named for this method alone.
OURS = "ours"
BASELINE = "baseline"

# Longest n-gram that is looked up; longer repeats are rare in running text.
NGRAM_PROMPT_LOOKUP_MAX = 4

# Takes K, or None for no number, and the drafter's folder, or None for methods without.
Configure = Callable[[int | None, Path | None], dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A way to decode.

    Args:
        name: on the command line, in tables and results.
        about: a few words for `--help`.
        configure: makes vLLM's `speculative_config`; None for plain decoding.
        num_speculative_tokens: its own K, used where no number is asked for; None leaves it to `configure`.
        drafter: `OURS`, `BASELINE`, or None for a method that needs no folder.
        environment: variables of its engine's process.
        without_far_memory: its drafter forgets what lies behind its window; see `without_far_memory`.
        served: whether a server would be run with it, so that it may be recommended.
        simulated: whether `qm-spec simulate` can predict it.
        requires: the module without which vLLM refuses it, and what installs it.
        colour, marker, line: in plots. A dashed line lies on another one that must show through.
    """

    name: str
    about: str
    configure: Configure | None
    colour: str
    marker: str
    line: str = "-"
    num_speculative_tokens: int | None = None
    drafter: str | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    without_far_memory: bool = False
    served: bool = True
    simulated: bool = False
    requires: tuple[str, str] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it drafts nothing."""
        return self.configure is None

    def speculative_config(self, num_speculative_tokens: int | None, drafter: Path | None) -> dict[str, Any] | None:
        """Return vLLM's `speculative_config`, None for plain decoding.

        Args:
            num_speculative_tokens: K; None for the method's own.
            drafter: its folder, None for a method that needs none.

        Raises:
            FileNotFoundError, ValueError: the drafter's configuration is missing or not usable.
        """
        if self.configure is None:
            return None
        return self.configure(num_speculative_tokens or self.num_speculative_tokens, drafter)

    def engine_environment(self, device: str, *, as_served: bool = False) -> dict[str, str]:
        """Return the whole environment of its engine's process; see `environment.engine_environment`."""
        return {**engine_environment(device, as_served=as_served), **self.environment}

    @property
    def missing(self) -> str | None:
        """What must be installed first, None for nothing."""
        if self.requires is None or find_spec(self.requires[0]) is not None:
            return None
        return f"{self.name} needs {self.requires[1]}; pip install {self.requires[1]}, or leave {self.name} out"


def _ngram(num_speculative_tokens: int | None, _drafter: Path | None) -> dict[str, Any]:
    return {
        "method": "ngram",
        "num_speculative_tokens": num_speculative_tokens,
        "prompt_lookup_max": NGRAM_PROMPT_LOOKUP_MAX,
    }


def _suffix(num_speculative_tokens: int | None, _drafter: Path | None) -> dict[str, Any]:
    depth = {} if num_speculative_tokens is None else {"num_speculative_tokens": num_speculative_tokens}
    return {"method": "suffix", **depth}


def _quickmerge(num_speculative_tokens: int | None, drafter: Path | None) -> dict[str, Any]:
    assert drafter is not None
    return vllm_settings(drafter, num_speculative_tokens)


def _baseline(num_speculative_tokens: int | None, drafter: Path | None) -> dict[str, Any]:
    """Configure a drafter of either kind: one of ours, or EAGLE-3 in vLLM's format with the K of its config."""
    assert drafter is not None
    if is_drafter(drafter):
        return vllm_settings(drafter, num_speculative_tokens)
    depth = num_speculative_tokens or read_json(drafter / "config.json").get("num_speculative_tokens")
    if depth is None:
        raise ValueError(
            f"baseline: {drafter}/config.json must name num_speculative_tokens, names none; pass a number for all "
            "methods with num_speculative_tokens"
        )
    return {"method": "eagle3", "model": str(drafter.absolute()), "num_speculative_tokens": depth}


_ARCTIC = ("arctic_inference", "arctic-inference")

# In the order of tables. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
METHODS: dict[str, Method] = {
    one.name: one
    for one in (
        Method(REFERENCE_METHOD, "plain decoding, always run", None, "#999999", "s", simulated=True),
        Method(NOISE_METHOD, "the same again: shows the noise floor", None, "#CCCCCC", "x", served=False),
        Method(
            "ngram",
            "vLLM's n-gram lookup, 4 tokens",
            _ngram,
            "#E69F00",
            "^",
            num_speculative_tokens=4,
            simulated=True,
        ),
        Method(
            f"ngram-{MOST_LIKELY}",
            f"the same, {MOST_LIKELY} tokens",
            _ngram,
            "#E69F00",
            "v",
            "--",
            num_speculative_tokens=MOST_LIKELY,
        ),
        Method("suffix", "vLLM's suffix decoding, with arctic-inference", _suffix, "#CC79A7", "p", requires=_ARCTIC),
        Method(
            "eagle3",
            "EAGLE-3 by vLLM's own code, with --baseline eagle3=DIR",
            _baseline,
            "#009E73",
            "X",
            drafter=BASELINE,
        ),
        Method(
            "eagle3-window",
            "another one, such as with a window",
            _baseline,
            "#009E73",
            "d",
            "--",
            drafter=BASELINE,
        ),
        Method("qm_spec", "ours", _quickmerge, "#0072B2", "o", drafter=OURS, simulated=True),
        Method(
            "qm_spec-prior",
            "ours without suffix lookup",
            _quickmerge,
            "#56B4E9",
            "*",
            drafter=OURS,
            environment={"QM_SPEC_LOOKUP": "0"},
        ),
        Method(
            "qm_spec-lookup",
            "ours with suffix lookup where a request repeats itself, whatever the drafter says",
            _quickmerge,
            "#D55E00",
            "P",
            drafter=OURS,
            environment={"QM_SPEC_LOOKUP": str(SURE_LENGTH)},
        ),
        Method(
            "qm_spec-window",
            "ours with emptied far memory",
            _quickmerge,
            "#56B4E9",
            "D",
            "--",
            drafter=OURS,
            without_far_memory=True,
            served=False,
            simulated=True,
        ),
        Method(
            "qm_spec-reference",
            "ours without its compiled operators",
            _quickmerge,
            "#0072B2",
            "h",
            ":",
            drafter=OURS,
            environment={"QM_SPEC_BACKEND": "reference"},
            served=False,
        ),
    )
}
# Of methods without a record, such as baselines under names of their own.
_OTHER_COLOURS = ("#D55E00", "#CC79A7", "#E69F00", "#56B4E9")


def find_method(name: str) -> Method:
    """Return the record of a method; a name without one is that of a baseline."""
    return METHODS[name] if name in METHODS else replace(METHODS["eagle3"], name=name, about="a baseline")


def method_order(name: str) -> int:
    """Return a method's place in tables; those without a record come last."""
    return list(METHODS).index(name) if name in METHODS else len(METHODS)


def line_style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Return matplotlib's colour, marker and line of a method, the same in every plot.

    Args:
        names: all methods that are drawn.
    """
    one = find_method(name)
    colour = one.colour
    if name not in METHODS:
        others = [other for other in names if other not in METHODS]
        colour = _OTHER_COLOURS[others.index(name) % len(_OTHER_COLOURS)]
    fill = "full" if one.line == "-" else "none"
    return {"color": colour, "marker": one.marker, "linestyle": one.line, "fillstyle": fill}


def check_baseline(name: str, folder: Path, target: Path, num_speculative_tokens: int | None) -> None:
    """Refuse a baseline's folder that cannot draft for a target.

    Raises:
        FileNotFoundError: the folder, its config or its weights are missing.
        ValueError: its config names another target's fingerprint.
    """
    if is_drafter(folder):
        check_drafter(folder, target, num_speculative_tokens)
        return
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"baseline: {name}={folder} must be a folder with config.json and *.safetensors of an EAGLE-3 drafter in "
            "vLLM's format, or of one of ours"
        )
    stated = read_json(folder / "config.json").get("target_fingerprint")
    if stated is not None and stated != target_fingerprint(target):
        raise ValueError(
            f"baseline: {name}={folder} was trained for the target with fingerprint {stated}, but {target} has "
            f"{target_fingerprint(target)}; pass one that was trained for it"
        )


def without_far_memory(drafter: Path, folder: Path) -> Path:
    """Make a drafter in `folder` with the same weights, but nothing kept of the tokens behind its window.

    Returns:
        `folder`, whose files are links into `drafter` except for the changed `config.json`.
    """
    folder.mkdir(parents=True)
    for file in drafter.resolve().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = read_json(drafter / "config.json")
    config["quickmerge"]["schedule"] = [0]
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
