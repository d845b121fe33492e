"""The exit codes of `qm-spec`, as docs/reference/cli.md has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from qm_spec.__main__ import main


def code_of(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["qm-spec", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_wrong_options_and_wrong_input_have_one_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(monkeypatch, "inspect", "--no-such-option") == 2
    capsys.readouterr()
    assert code_of(monkeypatch, "inspect", tmp_path / "none") == 2
    assert capsys.readouterr().err.startswith("error: drafter: expected a folder")


def test_a_problem_that_was_found_has_another(
    monkeypatch: pytest.MonkeyPatch, drafter: Path, target: Path, tmp_path: Path
) -> None:
    assert code_of(monkeypatch, "inspect", drafter, "--target", target) == 0
    (target / "tokenizer.json").write_text("{}")
    assert code_of(monkeypatch, "inspect", drafter, "--target", target) == 1


@pytest.mark.parametrize("name", ["doctor", "init", "inspect", "install"])
def test_help_has_an_example(name: str, run: Any) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0 and f"qm-spec {name}" in done.stdout.split("Example")[1]
