"""`qm-spec doctor` finds what keeps qm_spec from running, and is not ended by it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import edit_json, write_drafter, write_json, write_target

from qm_spec import provenance
from qm_spec.bench import environment
from qm_spec.diagnosis import installation, plugin
from qm_spec.diagnosis.finding import Finding, examine

Found = dict[str, list[dict[str, str]]]
DOCTOR = "import sys; sys.argv = ['qm-spec', 'doctor']; from qm_spec.__main__ import main; main()"


@pytest.fixture
def findings(run: Any) -> Callable[..., Found]:
    """Run the doctor and return its findings by what they are about, after a look at its exit code."""

    def examined(*arguments: object) -> Found:
        done = run("doctor", "--json", *arguments)
        found: Found = {}
        for finding in json.loads(done.stdout):
            found.setdefault(finding["about"], []).append(finding)
        problems = [one for ones in found.values() for one in ones if one["level"] == "problem"]
        assert done.exit_code == bool(problems), done.output
        return found

    return examined


def levels(found: Found, about: str) -> list[str]:
    return [finding["level"] for finding in found[about]]


def doctor_elsewhere(code: str = DOCTOR, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, cwd="/", capture_output=True, text=True
    )


def test_every_finding_is_one_line_and_the_exit_code_says_whether_one_is_a_problem(run: Any, target: Path) -> None:
    write_drafter(target / "qm_spec", target)
    done = run("doctor", "--target", target)
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warning", "problem"}
    assert done.exit_code == any(line.startswith("problem") for line in lines)
    assert f"ok       drafter        {target / 'qm_spec'} fits, K 4" in lines


def test_vllm_is_not_imported() -> None:
    code = DOCTOR.replace("main()", "\ntry: main()\nfinally: print('vllm' in sys.modules)")
    assert doctor_elsewhere(code).stdout.splitlines()[-1] == "False"


# Packages


def test_without_torch_every_other_check_still_runs() -> None:
    done = doctor_elsewhere(f"import sys; sys.modules['torch'] = None; {DOCTOR}")
    assert done.returncode == 1 and done.stderr == ""
    assert "problem  kernels        cannot be checked without torch; pip install 'qm_spec[models]'" in done.stdout
    assert "problem  processor" in done.stdout and "plug-in" in done.stdout


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("torch", "2.9.1", "2.9.1 is installed, qm_spec needs >=2.10"),
        ("transformers", "4.57.0", "4.57.0 is installed, qm_spec needs >=5.16"),
        ("safetensors", None, "is not installed"),
    ],
)
def test_a_package_that_is_too_old_or_missing(
    package: str, version: str | None, message: str, findings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def stated(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", stated)
    [finding] = findings()[package]
    assert (finding["level"], finding["found"]) == ("problem", message)
    assert finding["remedy"].startswith(f"pip install '{package}>=")


def test_a_package_that_was_only_put_on_the_path(findings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stated(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", stated)
    assert levels(findings(), "qm_spec") == ["problem"]


# Kernels and the machine


@pytest.fixture
def damaged(root: Path, tmp_path: Path) -> str:
    """A folder with the package and kernels that do not load."""
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "zoo")
    shutil.copytree(root / "qm_spec", tmp_path / "copy/qm_spec", ignore=left_out)
    (tmp_path / "copy/qm_spec/_C.abi3.so").write_bytes(b"no library")
    return str(tmp_path / "copy")


def test_kernels_that_do_not_load_are_a_warning_and_a_problem_where_they_are_asked_for(damaged: str) -> None:
    done = doctor_elsewhere(PYTHONPATH=damaged, QM_SPEC_BACKEND="auto")
    [line] = [line for line in done.stdout.splitlines() if "kernels" in line]
    assert line.startswith("warning  kernels (cpu)  the kernels in ") and "do not load" in line and "build them" in line
    assert done.stderr == ""
    done = doctor_elsewhere(PYTHONPATH=damaged, QM_SPEC_BACKEND="compiled")
    assert done.returncode == 1 and done.stderr == ""
    [line] = [line for line in done.stdout.splitlines() if "kernels" in line]
    assert (
        line.startswith("problem  kernels        QM_SPEC_BACKEND=compiled: ")
        and "set QM_SPEC_BACKEND=reference" in line
    )


def test_a_backend_that_there_is_not() -> None:
    done = doctor_elsewhere(QM_SPEC_BACKEND="fast")
    assert done.returncode == 1 and done.stderr == ""
    assert "problem  kernels        QM_SPEC_BACKEND must be one of auto, compiled, reference, got 'fast'" in done.stdout


def test_a_processor_without_bfloat16_is_told_which_dtype_is_fast(
    findings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "default_device", lambda: "cpu")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for instruction, level in (("avx512_f", "warning"), ("avx512_bf16", "ok")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=instruction: {has: True})
        [finding] = findings()["processor"]
        assert finding["level"] == level
        assert (finding["remedy"] or "").endswith("--dtype float32") == (level == "warning")


def test_a_gpu_that_torch_cannot_use(findings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "default_device", lambda: "cpu")
    monkeypatch.setattr(installation, "_NVIDIA_GPUS", tmp_path / "gpus")
    assert levels(findings(), "GPU") == ["ok"]
    (tmp_path / "gpus/0000:00:01.0").mkdir(parents=True)
    [finding] = findings()["GPU"]
    assert finding["level"] == "warning" and finding["remedy"].startswith("make install GPU=1")


# vLLM and the plug-in


def test_without_vllm(findings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    [finding] = findings()["vLLM"]
    assert (finding["level"], finding["found"]) == ("problem", "is not installed")
    assert finding["remedy"].startswith("install vllm==0.33.*")


@pytest.mark.parametrize(
    ("version", "level"),
    [("0.32.0+cpu", "ok"), ("0.33.1", "ok"), ("0.31.0", "problem"), ("0.34.0", "problem"), (None, "warning")],
)
def test_the_version_of_vllm(version: str | None, level: str, findings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {**provenance.versions(), "vllm": version}
    monkeypatch.setattr(provenance, "versions", lambda: {k: v for k, v in versions.items() if v is not None})
    monkeypatch.setattr(plugin, "find_spec", lambda name: object())
    [finding] = findings()["vLLM"]
    assert finding["level"] == level
    assert level == "ok" or "supports vLLM 0.32 to 0.33" in finding["found"] + finding["remedy"]


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        ("", "export VLLM_PLUGINS=qm_spec, or unset it"),
        ("other", "export VLLM_PLUGINS=other,qm_spec, or unset it"),
        # vLLM does not trim.
        ("other, qm_spec", "export VLLM_PLUGINS=other,qm_spec, or unset it"),
        ("other,qm_spec", None),
    ],
)
def test_plugins_that_vllm_may_load(
    names: str, remedy: str | None, findings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", names)
    [finding] = findings()["plug-in"]
    assert (finding["level"], finding["remedy"]) == ("problem" if remedy else "ok", remedy)


def test_a_missing_or_broken_entry_point(findings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: ())
    [finding] = findings()["plug-in"]
    assert finding["level"] == "problem" and "no entry point qm_spec" in finding["found"]
    broken = importlib.metadata.EntryPoint("qm_spec", "qm_spec.config:nowhere", "vllm.general_plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: (broken,))
    [finding] = findings()["plug-in"]
    assert finding["level"] == "problem" and "AttributeError" in finding["found"] and finding["remedy"]


# Target and drafter


def test_a_target_without_a_drafter(findings: Any, target: Path) -> None:
    found = findings("--target", target)
    assert levels(found, "target") == ["ok"] and levels(found, "drafter") == ["problem"]
    assert f"qm-spec train --target {target}" in found["drafter"][0]["found"]


def test_the_drafter_of_another_target(findings: Any, drafter: Path, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", words="hgfedcba")
    [finding] = findings("--target", other, "--draft", drafter)["drafter"]
    assert finding["level"] == "problem" and "fingerprint" in finding["found"]


def test_a_drafter_alone(findings: Any, drafter: Path) -> None:
    [finding] = findings("--draft", drafter)["drafter"]
    assert finding["level"] == "ok" and "is sound" in finding["found"]
    (drafter / "model.safetensors").write_bytes(b"cut")
    assert levels(findings("--draft", drafter), "drafter") == ["problem"]


def test_a_target_that_is_nowhere_is_said_once(findings: Any, tmp_path: Path) -> None:
    found = findings("--target", tmp_path / "nowhere")
    assert levels(found, "target") == ["problem"] and "drafter" not in found


def test_a_folder_that_cannot_be_read(findings: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever may read everything, as in a container, is not kept from it by the file's mode.
    real = Path.read_text

    def read_text(self: Path, *arguments: Any, **named: Any) -> str:
        if self == target / "config.json":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", read_text)
    [finding] = findings("--target", target)["target"]
    assert finding["level"] == "problem" and str(target) in finding["found"]
    assert finding["remedy"] == "give this user the right to read it"


def test_an_untrained_drafter_is_a_warning(findings: Any, drafter: Path, target: Path) -> None:
    write_json(drafter / "provenance.json", {"stages": [{"steps": 0}]})
    arguments = ("--target", target, "--draft", drafter)
    assert levels(findings(*arguments), "drafter") == ["warning", "ok"]
    write_json(drafter / "provenance.json", {"stages": [{"steps": 0}, {"steps": 9}]})
    assert levels(findings(*arguments), "drafter") == ["ok"]


def test_what_the_checks_warn_of_is_a_finding(findings: Any, tmp_path: Path, target: Path) -> None:
    edit_json(target / "config.json", eos_token_id=7)
    folder = write_drafter(tmp_path / "d", target, [0, 1, 3, 28], draft_vocab_size=4)
    found = findings("--target", target, "--draft", folder)
    assert levels(found, "drafter") == ["warning", "ok"]
    assert "lacks token 7" in found["drafter"][0]["found"]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: run ./install.sh")
@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("LlamaForCausalLM", ["ok"]), ("GPT2LMHeadModel", ["ok", "warning"]), ("OfNextYear", ["ok"])],
)
def test_a_target_whose_class_hands_out_no_states(
    architecture: str, expected: list[str], findings: Any, target: Path
) -> None:
    edit_json(target / "config.json", architectures=[architecture])
    assert levels(findings("--target", target), "target") == expected


# Findings


def test_a_check_that_fails_is_a_problem_after_what_it_found() -> None:
    def check() -> Any:
        yield Finding("ok", "a", "b")
        raise RuntimeError("broken\nlibrary")

    first, second = examine("a", check, "mend it")
    assert first == Finding("ok", "a", "b")
    assert second.line() == "problem  a              RuntimeError: broken library; mend it"


def test_a_name_cannot_break_the_line() -> None:
    assert Finding("ok", "a", "x\ny\x1b[1A").line().isprintable()
