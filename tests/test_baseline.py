"""What the kernels' benchmark calls a regression."""

from __future__ import annotations

import json

import pytest
from baseline import compare_records, read_record


def row(operator="attention", time_ms=1.0, reference_ms=10.0, sizes="8 x 64") -> dict:
    return {"operator": operator, "sizes": sizes, "dtype": "float32", "time_ms": time_ms, "reference_ms": reference_ms}


def record(*rows: dict, **changes) -> dict:
    return {"backend": "compiled", "device": "AVX512", "threads": 2, "rows": list(rows), **changes}


def test_a_busy_machine_is_no_regression():
    # Everything takes twice as long, the reference too.
    (change,) = compare_records(record(row()), record(row(time_ms=2.0, reference_ms=20.0))).changes
    assert change.slowdown == 1.0
    assert not change.regressed(0.0)


def test_regressions_are_those_beyond_the_tolerance_worst_first():
    before = record(row("a"), row("b"), row("c"), row("d"))
    after = record(row("a", 1.05), row("b", 1.2), row("c", 1.5), row("d", 0.5))
    comparison = compare_records(before, after)
    assert [change.operator for change in comparison.regressions(0.1)] == ["c", "b"]
    assert [change.operator for change in comparison.regressions(0.01)] == ["c", "b", "a"]
    assert str(comparison.regressions(0.1)[0]) == (
        "c 8 x 64 float32: 1.000 -> 1.500 ms, 1.50 times as long beside its reference"
    )


def test_rows_of_one_record_alone_are_named():
    comparison = compare_records(record(row(), row("old")), record(row(), row(sizes="9 x 64")))
    assert comparison.only_before == ("old 8 x 64 float32",)
    assert comparison.only_after == ("attention 9 x 64 float32",)
    assert len(comparison.changes) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 1}, "same backend, device, threads, got threads 2 and 1"),
        ({"backend": "reference"}, "got backend compiled and reference"),
        ({"rows": [row("other")]}, "must share an operator"),
    ],
)
def test_records_of_other_conditions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        compare_records(record(row()), {**record(row()), **changes})


def test_a_baseline_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; write a baseline with --save"):
        read_record(tmp_path / "gone.json")
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="must be a record of the kernels' benchmark"):
        read_record(file)
    file.write_text(json.dumps(record(row())))
    assert read_record(file) == record(row())
