"""Whatever a user hands in, a command ends soon, with exit code 2 and a sentence, and never with a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: run ./install.sh")
pytest.importorskip("typer", reason="typer is not installed: run ./install.sh")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_pair import NUM_WEIGHTS, edit_json, write_drafter, write_target
from typer.main import get_command

from qm_spec.__main__ import main
from qm_spec.cli import app
from qm_spec.config import MergeConfig
from qm_spec.discovery import check_drafter, search

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
LONGEST_S = 60

# A few in every run, always the same; many in `make test-long`, each time others.
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)


class Started(BaseException):
    """What was handed in is sound: the command begins its work."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny pair and files that are none; nothing is fetched, and no process starts."""
    folder = tmp_path_factory.mktemp("world")
    target = write_target(folder / "target")
    write_drafter(folder / "drafter", target)
    (folder / "prompts.jsonl").write_text('{"id": "a", "text": "a b c", "prompt": "a b"}\n')
    (folder / "garbage").write_bytes(bytes(range(256)))
    (folder / "empty").mkdir()

    def start(*arguments: Any, **options: Any) -> None:
        raise Started

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QM_SPEC_HOME", str(folder / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(search, "ZOO", folder / "zoo")
        patch.setattr("subprocess.Popen", start)
        patch.setattr("qm_spec.targets.fetch.download_from_hub", unreachable)
        patch.setattr("qm_spec.targets.fetch.download_wheel", unreachable)
        patch.setattr("qm_spec.simulation.measure.measure_hardware", start)
        patch.chdir(folder)
        yield folder


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Fail what takes as long as a hang."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done after {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(*arguments: str) -> tuple[int, str]:
    """Run `qm-spec` here and return exit code and what it has written; -1 where it would have begun its work."""
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, time_limit():
        patch.setattr(sys, "argv", ["qm-spec", *arguments])
        with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                return code, stream.getvalue()
            except Started:
                return -1, stream.getvalue()
    return 0, stream.getvalue()


def check(arguments: list[str]) -> None:
    """Anything that `main` lets through would end the program with a traceback."""
    code, text = run(*arguments)
    assert code in (-1, 0, 1, 2), (arguments, code, text)
    if code in (1, 2):
        assert text.strip() and "Traceback" not in text, (arguments, text)


# Command lines

WORDS = [
    *(
        "",
        " ",
        "x",
        "-1",
        "0",
        "1",
        "2",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "99999999999999999999",
        "1,2",
        ",",
        "1,,2",
    ),
    *("1,x", "[1]", "{", '{"a": 1}', "a=b", "=", "a=drafter", "a:b", ":", "é\u202e", "\n", "-", "--", "--help", "none"),
    *(
        "target",
        "drafter",
        "prompts.jsonl",
        "garbage",
        "empty",
        "nowhere/at/all",
        "/proc",
        "/dev/null",
        "qm_spec",
        "ngram",
    ),
    *("none,qm_spec", "cpu", "cuda", "float32", "float99", "entropy", "novels"),
]
# So that what stands behind is reached.
USUAL = {
    "--target": "target",
    "--data": "prompts.jsonl",
    "--prompts": "prompts.jsonl",
    "--out": "out",
    "--drafter": "drafter",
}


def command_lines(name: str) -> st.SearchStrategy[list[str]]:
    """Options of a command with values that fit or do not."""
    options, arguments = [], 0
    for parameter in get_command(app).commands[name].params:  # type: ignore[attr-defined]
        if parameter.param_type_name == "argument":
            arguments += 1
        else:
            options.append((parameter.opts[0], getattr(parameter, "is_flag", False), parameter.required))
    word = st.sampled_from(WORDS)
    required = [option for option, _, must in options if must]
    # Some commands have no option.
    options.append(("--no-such-option", True, False))
    given_option = st.sampled_from(options).flatmap(
        lambda option: st.just([option[0]]) if option[1] else st.tuples(st.just(option[0]), word).map(list)
    )
    usual = st.fixed_dictionaries(
        {},
        optional={
            option: st.just(USUAL[option]) if option in USUAL else word for option, flag, _ in options if not flag
        },
    ).map(lambda found: {key: value for key, value in found.items() if key in required or key in USUAL})
    return st.tuples(usual, st.lists(given_option, max_size=3), st.lists(word, max_size=arguments + 1)).map(
        lambda drawn: [
            *(part for pair in drawn[0].items() for part in pair),
            *(part for option in drawn[1] for part in option),
            *drawn[2],
        ]
    )


def command_line_holds(command: str) -> Callable[[list[str]], None]:
    return lambda arguments: check([command, *arguments])


# Files

MERGE_FIELDS = [field.name for field in dataclasses.fields(MergeConfig)]


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 300),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["1", "float32", "llama", "../x", "a\x00b"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
)
CONFIG = [
    *("architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "draft_vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps"),
    *("tie_word_embeddings", "eagle_aux_hidden_state_layer_ids", "num_speculative_tokens", "target_fingerprint"),
    *("quickmerge", "model_type", "dtype", "auto_map", "hidden_act", "rope_parameters"),
]
CONFIGS = st.one_of(
    st.dictionaries(st.sampled_from(CONFIG), VALUES, min_size=1, max_size=3),
    st.fixed_dictionaries(
        {"quickmerge": st.dictionaries(st.sampled_from([*MERGE_FIELDS, "widnow"]), VALUES, min_size=1, max_size=3)}
    ),
)
TENSOR = st.fixed_dictionaries(
    {}, optional={"dtype": VALUES | st.sampled_from(["F32", "BF16", "I64"]), "shape": VALUES, "data_offsets": VALUES}
)
HEADERS = st.one_of(
    VALUES.map(encoded),
    st.dictionaries(st.sampled_from(["weight", "d2t", "__metadata__", ""]), TENSOR | VALUES, max_size=3).map(encoded),
    st.binary(max_size=40),
)
ROWS = st.dictionaries(
    st.sampled_from(
        ["id", "text", "prompt", "messages", "turns", "conversations", "category", "timestamp", "question"]
    ),
    VALUES,
    max_size=4,
)
FILES = st.one_of(
    st.lists(ROWS.map(json.dumps), max_size=4).map(lambda lines: "\n".join(lines).encode()),
    VALUES.map(encoded),
    st.binary(max_size=60),
)


def config_holds(world: Path) -> Callable[[dict[str, Any]], None]:
    """A drafter with any settings is refused in a sentence, or is one that fits."""

    def holds(changed: dict[str, Any]) -> None:
        drafter = world / "changed"
        shutil.rmtree(drafter, ignore_errors=True)
        shutil.copytree(world / "drafter", drafter)
        edit_json(drafter / "config.json", **{key: value for key, value in changed.items() if value is not None})
        for arguments in (["inspect", "changed", "--target", "target"], ["doctor", "--target", "target"]):
            check(arguments)
        with contextlib.suppress(OSError, ValueError), time_limit():
            check_drafter(drafter, world / "target")

    return holds


def header_holds(world: Path) -> Callable[[bytes, int], None]:
    """Weights with any header are refused in a sentence, or are some that fit."""

    def holds(header: bytes, wrong_by: int) -> None:
        drafter = world / "changed"
        shutil.rmtree(drafter, ignore_errors=True)
        shutil.copytree(world / "drafter", drafter)
        length = max(0, len(header) + wrong_by).to_bytes(8, "little")
        (drafter / "model.safetensors").write_bytes(length + header + bytes(4 * NUM_WEIGHTS))
        check(["inspect", "changed", "--target", "target"])
        with contextlib.suppress(OSError, ValueError), time_limit():
            check_drafter(drafter, world / "target")

    return holds


def prompts_hold(world: Path) -> Callable[[bytes, str], None]:
    """A file of prompts is read, or refused in a sentence."""

    def holds(content: bytes, suffix: str) -> None:
        name = f"any{suffix}"
        (world / name).write_bytes(content)
        check(["eval", "--target", "target", "--prompts", name, "--methods", "none", "--out", "out"])
        check(["data", "--target", "target", "--prompts", name, "--out", "out-data"])
        check(["generate", "--target", "target", "--prompts", name, "--out", "out-generated"])

    return holds


SUFFIXES = st.sampled_from([".jsonl", ".json", ".txt", ".jsonl.xz", ".jsonl.gz", ""])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line(command: str, world: Path) -> None:
    FEW(given(command_lines(command))(command_line_holds(command)))()


def test_a_config_of_a_drafter(world: Path) -> None:
    FEW(given(CONFIGS)(config_holds(world)))()


def test_a_header_of_weights(world: Path) -> None:
    FEW(given(HEADERS, st.sampled_from([0, 0, 0, 1, -1, 2**62]))(header_holds(world)))()


def test_a_file_of_prompts(world: Path) -> None:
    FEW(given(FILES, SUFFIXES)(prompts_hold(world)))()


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_many_command_lines(command: str, world: Path) -> None:
    MANY(given(command_lines(command))(command_line_holds(command)))()


@pytest.mark.long
def test_many_configs_of_drafters(world: Path) -> None:
    MANY(given(CONFIGS)(config_holds(world)))()


@pytest.mark.long
def test_many_headers_of_weights(world: Path) -> None:
    MANY(given(HEADERS, st.sampled_from([0, 0, 0, 1, -1, 2**62]))(header_holds(world)))()


@pytest.mark.long
def test_many_files_of_prompts(world: Path) -> None:
    MANY(given(FILES, SUFFIXES)(prompts_hold(world)))()
