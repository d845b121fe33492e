"""`qm-spec inspect` says what a drafter is, from its config and the header of its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
from support.tiny_pair import NUM_WEIGHTS, edit_json, write_drafter, write_json, write_target

from qm_spec.config import MergeConfig
from qm_spec.ops.page import slot_elements
from qm_spec.pairs import ZOO


@pytest.fixture
def inspected(run: Any) -> Any:
    """What `qm-spec inspect` prints, by name."""

    def lines(*arguments: object, exit_code: int = 0) -> dict[str, str]:
        done = run("inspect", *arguments)
        assert done.exit_code == exit_code, done.output
        return {line[:18].strip(): line[18:] for line in done.stdout.splitlines()}

    return lines


def test_sizes_are_those_of_config_and_file(inspected: Any, drafter: Path) -> None:
    said = inspected(drafter)
    num_bytes = (drafter / "model.safetensors").stat().st_size
    assert said["weights"].startswith(f"{NUM_WEIGHTS:,} parameters, {num_bytes:,} bytes in F32")
    assert said["sizes"] == "hidden 64, MLP 128, 4 query and 2 key/value heads of 16"
    assert said["aux layers"] == "1, 3, 5" and said["K"].startswith("4 ")
    assert said["draft vocabulary"] == "all 32 tokens" and said["lookup"] == "none"
    assert said["merging"] == "window 32; then groups of 8 as 4, 2, 1 entries, by entropy"
    assert said["provenance"] == "no record" and "fits" not in said


def test_the_cost_of_the_memory_is_that_of_pages_and_schedule(inspected: Any, drafter: Path) -> None:
    said = inspected(drafter)
    entry = 2 * slot_elements(16, torch.bfloat16) * 2
    assert said["KV cache"].startswith(f"{entry} bytes for each token")
    merge = MergeConfig.from_dict(json.loads((drafter / "config.json").read_text())["quickmerge"])
    for context in (1024, 8192, 32768):
        read = merge.entries_attended(context)
        assert said[f"at {context:,}"] == f"a draft token reads {read:,} entries, {read * entry:,} bytes"


def test_a_draft_vocabulary_and_lookup(inspected: Any, tmp_path: Path, target: Path) -> None:
    folder = write_drafter(tmp_path / "d", target, [0, 1, 3, 28], draft_vocab_size=4, lookup_length=5)
    said = inspected(folder)
    assert said["draft vocabulary"] == "4 of 32 tokens" and said["lookup"] == "copies from a match of 5 tokens"
    # The table is no weight.
    assert said["weights"].startswith(f"{NUM_WEIGHTS:,} parameters")


def test_no_weights_are_read(inspected: Any, drafter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = safetensors.safe_open

    def shape_of(tensor: Any) -> Any:
        return SimpleNamespace(get_shape=tensor.get_shape, get_dtype=tensor.get_dtype)

    @contextmanager
    def header(*arguments: Any, **named: Any) -> Iterator[Any]:
        with opened(*arguments, **named) as weights:
            # Without a way to read a tensor.
            yield SimpleNamespace(keys=weights.keys, get_slice=lambda name: shape_of(weights.get_slice(name)))

    monkeypatch.setattr(safetensors, "safe_open", header)
    inspected(drafter)


def test_every_stage_of_training_is_named(inspected: Any, drafter: Path) -> None:
    learned = {"steps": 9, "rows": 1234, "valid_acceptance_length": 2.345, "commit": "abc"}
    write_json(drafter / "provenance.json", {"stages": [learned, {"command": "the mean of two"}]})
    said = inspected(drafter)
    assert said["stage 1 of 2"] == (
        "9 steps, 1,234 rows learned, acceptance length 2.35 on validation documents, commit abc"
    )
    assert said["stage 2 of 2"] == "the mean of two"


@pytest.mark.parametrize("record", [{}, {"stages": 3}, {"stages": [3]}])
def test_a_record_that_is_none(record: dict[str, Any], run: Any, drafter: Path) -> None:
    write_json(drafter / "provenance.json", record)
    done = run("inspect", drafter)
    assert isinstance(done.exception, ValueError) and "must hold a list of stages" in str(done.exception)


def test_whether_it_fits_a_target_and_why_not(inspected: Any, drafter: Path, target: Path, tmp_path: Path) -> None:
    assert inspected(drafter, "--target", target)["fits"] == f"yes: {target}, K 4"
    other = write_target(tmp_path / "other", words="hgfedcba")
    assert "fingerprint" in inspected(drafter, "--target", other, exit_code=1)["fits"]


def test_a_folder_that_is_no_drafter(run: Any, target: Path, drafter: Path) -> None:
    for folder, problem in ((target, "not a QuickMerge drafter"), (target / "none", "expected a folder")):
        assert problem in str(run("inspect", folder).exception)
    edit_json(drafter / "config.json", quickmerge={"window": 4})
    assert "entry quickmerge" in str(run("inspect", drafter).exception)


@pytest.mark.parametrize("folder", sorted(ZOO.glob("*/drafter")), ids=lambda folder: folder.parent.name)
def test_a_shipped_drafter(folder: Path, inspected: Any) -> None:
    said = inspected(folder)
    assert said["stage 1 of " + str(len([name for name in said if name.startswith("stage")]))]
    assert "BF16" in said["weights"] and "UNTRAINED" not in said["kind"]
