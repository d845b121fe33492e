"""A drafter put where the name `qm_spec` finds it: checked, copied aside, and renamed."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from qm_spec.discovery.checks import check_drafter
from qm_spec.discovery.files import scratch_folder, shown
from qm_spec.discovery.fingerprint import target_fingerprint
from qm_spec.discovery.search import drafter_home, drafter_place

# What a drafter is made of. A folder of training also holds its work.
_REQUIRED, _OPTIONAL = ("config.json", "model.safetensors"), ("provenance.json", "README.md")


def install_drafter(drafter: Path, target: str, force: bool = False) -> Path:
    """Copy a drafter to its target's place and return that folder; it appears there whole or not at all.

    Args:
        drafter: its folder, which stays; where it is that place, nothing is done.
        target: a local folder, or a hub id that transformers can find.
        force: replace what lies at the place, which is gone only when the new one is there.

    Raises:
        FileExistsError: something lies at the place, and `force` is not given.
        FileNotFoundError: the drafter, one of its files or the target is missing.
        PermissionError: the place cannot be written.
        TypeError, ValueError: the drafter does not fit this target, see `check_drafter`.
    """
    folder = drafter.expanduser()
    check_drafter(folder, target)
    place = drafter_place(target)
    there = place.is_symlink() or place.exists()
    if there and place.resolve() == folder.resolve():
        return place
    if there and not force:
        raise FileExistsError(f"install: {shown(place)} is there already; --force replaces it with all its files")
    try:
        with scratch_folder(place.with_name(f".{place.name}.partial")) as aside:
            _copy(folder, aside / "new")
            # The copy, too: the drafter may have been trained on meanwhile.
            check_drafter(aside / "new", target)
            _put(aside / "new", place)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        at_home = drafter_home() / target_fingerprint(target)
        way_out = "" if place == at_home else f", or copy the drafter to {shown(at_home)}, where it is found too"
        raise PermissionError(
            f"install: {shown(place.parent)} cannot be written ({error.strerror}); get the right to{way_out}"
        ) from error
    return place


def _put(new: Path, place: Path) -> None:
    """Give a folder its name; what has that name keeps it until then, and again if this fails."""
    old = place.with_name(f".{place.name}.old")
    _remove(old)
    there = place.is_symlink() or place.exists()
    if there:
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if there:
            old.rename(place)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _copy(drafter: Path, folder: Path) -> None:
    folder.mkdir()
    for name in _REQUIRED:
        shutil.copyfile(drafter / name, folder / name)
    for name in _OPTIONAL:
        if (drafter / name).is_file():
            shutil.copyfile(drafter / name, folder / name)
