"""`qm-spec install` puts a drafter where the name `qm_spec` finds it, whole or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import write_drafter, write_target

from qm_spec.discovery import find_drafter, target_fingerprint

FILES = ["config.json", "model.safetensors", "provenance.json"]


@pytest.fixture
def drafter(drafter: Path) -> Path:
    """With a record, and with what training leaves beside it."""
    (drafter / "provenance.json").write_text('{"stages": []}')
    (drafter / "work").mkdir()
    return drafter


@pytest.fixture
def old(target: Path) -> Path:
    """A drafter that is in the place already."""
    return write_drafter(target / "qm_spec", target, num_speculative_tokens=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def test_the_name_finds_it_beside_its_target(run: Any, drafter: Path, target: Path) -> None:
    done = run("install", drafter, "--target", target)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"installed {target / 'qm_spec'}",
        f"next: vllm serve {target} --speculative-model qm_spec",
    ]
    assert find_drafter(target) == target / "qm_spec"
    assert contents(target / "qm_spec") == contents(drafter)
    # No work, and nothing beside it.
    assert sorted(file.name for file in (target / "qm_spec").iterdir()) == FILES
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "qm_spec", "tokenizer.json"]


@pytest.fixture
def hub(target: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The target as a hub id."""
    import transformers.utils

    def cached_file(name: str, file: str, revision: str | None = None) -> str:
        if not (target / file).is_file():
            raise OSError(f"{name} has no {file}")
        return str(target / file)

    monkeypatch.setattr(transformers.utils, "cached_file", cached_file)
    return "org/model"


def test_for_a_hub_id_it_goes_into_the_users_folder(
    run: Any, drafter: Path, target: Path, home: Path, hub: str
) -> None:
    place = home / target_fingerprint(target)
    assert run("install", drafter, "--target", hub).stdout.startswith(f"installed {place}\n")
    assert find_drafter(hub) == place and contents(place) == contents(drafter)


def test_a_drafter_in_the_hubs_repository_comes_first_and_that_is_said(
    run: Any, drafter: Path, old: Path, hub: str
) -> None:
    done = run("install", drafter, "--target", hub)
    assert done.exit_code == 0 and f"the name qm_spec finds {old} first" in done.stderr
    assert "next:" not in done.stdout


def test_what_is_there_stays_unless_it_is_to_be_replaced(run: Any, drafter: Path, target: Path, old: Path) -> None:
    before = contents(old)
    done = run("install", drafter, "--target", target)
    assert isinstance(done.exception, FileExistsError) and "--force replaces it" in str(done.exception)
    assert contents(old) == before
    assert run("install", drafter, "--target", target, "--force").exit_code == 0
    assert contents(old) == contents(drafter) != before
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "qm_spec", "tokenizer.json"]


def test_a_link_is_replaced_and_not_what_it_leads_to(run: Any, drafter: Path, target: Path, tmp_path: Path) -> None:
    elsewhere = write_drafter(tmp_path / "elsewhere", target, num_speculative_tokens=2)
    before = contents(elsewhere)
    (target / "qm_spec").symlink_to(elsewhere)
    assert run("install", drafter, "--target", target, "--force").exit_code == 0
    assert contents(elsewhere) == before
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "qm_spec", "tokenizer.json"]
    assert not (target / "qm_spec").is_symlink() and contents(target / "qm_spec") == contents(drafter)


def test_a_drafter_that_is_in_its_place_is_left_as_it_is(run: Any, target: Path, old: Path) -> None:
    (old / "work").mkdir()
    for options in ((), ("--force",)):
        assert run("install", old, "--target", target, *options).exit_code == 0
    assert (old / "work").is_dir()


def test_a_drafter_that_does_not_fit_is_refused(run: Any, drafter: Path, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", words="hgfedcba")
    done = run("install", drafter, "--target", other)
    assert isinstance(done.exception, ValueError) and "fingerprint" in str(done.exception)
    assert not (other / "qm_spec").exists()
    (drafter / "model.safetensors").write_bytes(b"cut")
    assert "corrupt" in str(run("install", drafter, "--target", tmp_path / "target", "--force").exception)


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("moment", ["copy", "changed copy", "rename"])
def test_an_error_leaves_everything_as_it_was(
    moment: str, replaces: bool, run: Any, drafter: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = target / "qm_spec"
    if replaces:
        write_drafter(place, target, num_speculative_tokens=2)
    before = contents(place) if replaces else None
    copy, rename = shutil.copyfile, Path.rename

    def fails(source: Path, copied: Path) -> None:
        copy(source, copied)
        if copied.name == "model.safetensors":
            if moment == "copy":
                raise OSError(errno.ENOSPC, "No space left on device")
            copied.write_bytes(b"cut")

    def breaks(self: Path, name: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, name)

    if moment == "rename":
        monkeypatch.setattr(Path, "rename", breaks)
    else:
        monkeypatch.setattr(shutil, "copyfile", fails)
    done = run("install", drafter, "--target", target, "--force")
    assert isinstance(done.exception, OSError | ValueError)
    assert (contents(place) if place.exists() else None) == before
    left = {file.name for file in target.iterdir()} - {"qm_spec"}
    assert left == {"config.json", "tokenizer.json"}


def test_a_target_that_cannot_be_written_names_the_other_place(
    run: Any, drafter: Path, target: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **named: Any) -> None:
        if self.parent == target:
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        real(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    done = run("install", drafter, "--target", target)
    assert isinstance(done.exception, PermissionError)
    assert f"copy the drafter to {home / target_fingerprint(target)}" in str(done.exception)
