"""README and docs say what the code does: links, examples, options, tables; and they can be read."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = sorted(ROOT.glob("docs/guide/*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "csrc/README.md"])
# Results are long tables that other rules hold.
PROSE = [page for page in PAGES if "results" not in page.parts]
# Blocks that say `<!-- not run: why -->`; one more needs a reason, and a number here.
NUM_NOT_RUN = 1

LONGEST_SENTENCE, MEAN_SENTENCE, LONGEST_LINE, README_WORDS = 35, 16, 120, 900


class Block(NamedTuple):
    """A fenced block of a page: where, which language, what, and why it is not run."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str) -> Iterator[Block]:
    text = page.read_text()
    pattern = r"^( *)```(\w*)[^\n]*\n(.*?)^\1```"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        if match[2] == language:
            before = text[: match.start()].rstrip().rsplit("\n", 1)[-1]
            comment = re.fullmatch(r"\s*<!-- not run: (.+) -->", before)
            line = text.count("\n", 0, match.start()) + 1
            yield Block(page, line, language, match[3], comment and comment[1])


def all_blocks(pages: list[Path], language: str) -> list[Block]:
    return [block for page in pages for block in blocks(page, language)]


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def of_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Links


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as GitHub and the site make them."""
    found = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = urllib.parse.unquote(target).partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert not dead, f"{of_page(page)} links to what is not there"


@pytest.mark.parametrize("page", PROSE, ids=of_page)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    folders = ("qm_spec", "integrations", "csrc", "tests", "benchmarks", "examples", "docs")
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.*")]
    files += [f"/{path.name}" for path in ROOT.iterdir()]
    named = re.findall(r"`([\w./-]+\.(?:py|cpp|cu|cuh|h|sh|toml))`", without_code(page.read_text()))
    missing = [name for name in named if not any(file.endswith(f"/{name}") for file in files)]
    assert not missing, f"{of_page(page)} names files that are not there"


# Examples

PYTHON = all_blocks([ROOT / "README.md", *GUIDE], "python")


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block), marks=[pytest.mark.vllm] if "vllm" in block.text else [])
        for block in PYTHON
        if not block.not_run
    ],
)
def test_a_python_block_runs(block: Block, tmp_path: Path) -> None:
    # Examples may name files of the repository.
    for name in ("qm_spec", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = tmp_path / "example.py"
    script.write_text(block.text)
    # Small enough for any machine.
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_blocks_that_are_not_run_say_why() -> None:
    assert sum(block.not_run is not None for block in PYTHON) == NUM_NOT_RUN


class Command(NamedTuple):
    """A line of a shell block, in words."""

    block: Block
    words: list[str]

    def __str__(self) -> str:
        return f"{self.block} {' '.join(self.words[:3])}"


def shell_commands(pages: list[Path]) -> Iterator[Command]:
    for block in all_blocks(pages, "bash"):
        command = ""
        for line in block.text.replace("\\\n", " ").splitlines():
            command += f"{line}\n"
            try:
                words = shlex.split(command, comments=True)
            except ValueError:
                # A quotation that goes on in the next line.
                continue
            command = ""
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words = words[1:]
            if words:
                yield Command(block, words)


COMMANDS = list(shell_commands(PAGES))
OF_QM_SPEC = [command for command in COMMANDS if command.words[0] == "qm-spec"]
OF_VLLM = [command for command in COMMANDS if command.words[:2] == ["vllm", "serve"]]


def cli_page() -> Any:
    """The module that writes docs/reference/cli.md."""
    spec = importlib.util.spec_from_file_location("docs_cli", ROOT / "docs/hooks/cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", OF_QM_SPEC, ids=str)
def test_options_of_qm_spec_in_a_shell_block_exist(command: Command) -> None:
    _, name, *arguments = command.words
    found = cli_page().commands()
    assert name in found
    subcommand = found[name]
    context = subcommand.context_class(subcommand, info_name=name)
    given, rest, _ = subcommand.make_parser(context).parse_args(list(arguments))
    missing = [one.name for one in subcommand.params if one.required and not given.get(one.name)]
    assert not missing and not rest


@pytest.mark.vllm
@pytest.mark.parametrize("command", OF_VLLM, ids=str)
def test_options_of_vllm_in_a_shell_block_exist(command: Command) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from qm_spec.integrations.vllm_plugin.register import register

    register()
    # A wrong option ends with an error, which pytest shows.
    model, *options = command.words[2:]
    AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", model, *options])


def test_targets_of_make_and_scripts_in_shell_blocks_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in COMMANDS:
        program, *arguments = command.words
        if program == "make":
            named = {word for word in arguments if "=" not in word and not word.startswith("-")}
            assert named <= targets, str(command)
        elif program.endswith("python") and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).is_file(), str(command)


# Reference


def table_column(page: str, column: int, pattern: str = r"`([^`]+)`") -> list[str]:
    """What is named in a column of all tables of a page."""
    rows = [line.strip("| ").split(" | ") for line in (ROOT / page).read_text().splitlines() if line.startswith("| `")]
    return [name for row in rows if len(row) > column for name in re.findall(pattern, row[column])]


def source_files() -> Iterator[Path]:
    for folder in ("qm_spec", "integrations", "csrc", "benchmarks", "tests", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h") and path != Path(__file__):
                yield path
    yield from (ROOT / name for name in ("setup.py", "Makefile", "install.sh"))


def test_every_environment_variable_is_in_the_table() -> None:
    read: dict[str, set[str]] = {}
    for file in source_files():
        for name in re.findall(r"QM_SPEC_[A-Z0-9_]+", file.read_text()):
            read.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    page = "docs/reference/environment.md"
    rows = [line.strip("| ").split(" | ") for line in (ROOT / page).read_text().splitlines() if "| `QM_SPEC_" in line]
    table = {row[0].strip("`"): row[-1].strip("` ") for row in rows}
    assert set(table) == set(read), "docs/reference/environment.md against the code"
    assert all(place in read[name] for name, place in table.items()), "a variable is read elsewhere"


def test_the_page_of_the_command_line_is_the_codes() -> None:
    module = cli_page()
    assert module.PAGE.read_text() == module.page(), "run: make docs"


def test_every_field_of_the_config_is_in_the_table_with_its_default() -> None:
    from qm_spec.config import MergeConfig

    text = (ROOT / "docs/reference/config.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", text, re.MULTILINE))
    for name, value in MergeConfig().to_dict().items():
        assert json.loads(rows[name]) == value, name
    assert len(dataclasses.fields(MergeConfig)) == len(MergeConfig().to_dict())
    # The drafter's own fields, from the source: its constructor takes transformers' fields, too.
    tree = ast.parse((ROOT / "qm_spec/drafter/prior_config.py").read_text())
    init = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    fields = {argument.arg for argument in init.args.args} - {"self"}
    assert fields <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_every_patch_of_vllm_is_in_the_table() -> None:
    files = {file.name for file in ROOT.glob("integrations/vllm_plugin/patches/*.py")} - {"__init__.py"}
    patches = (ROOT / "docs/design.md").read_text().split("### Patches")[1].split("###")[0]
    assert set(re.findall(r"^\| `(\w+\.py)` \|", patches, re.MULTILINE)) == files


def test_every_counter_is_in_the_table() -> None:
    from qm_spec.integrations.vllm_plugin.counters import METRICS

    text = (ROOT / "docs/reference/metrics.md").read_text()
    counted = {f"qm_spec:{metric.name}_total" for metric in METRICS}
    assert set(re.findall(r"^\| `(qm_spec:\w+)` \|", text, re.MULTILINE)) == counted


# Prose


def sentences(page: Path) -> list[list[str]]:
    """The sentences of a page in words; code, tables, headings and links' targets are left out."""
    text = re.sub(r"<!--.*?-->", "", without_code(page.read_text()), flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = ["" if line.startswith(("|", "#")) else line for line in text.splitlines()]
    # A list item begins a paragraph of its own.
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", "\n".join(lines))
    found = [re.split(r"(?<=[.!?])\**\s+", " ".join(paragraph.split())) for paragraph in paragraphs]
    words = [re.findall(r"[\w'%.,/+-]*\w[\w'%]*", sentence) for parts in found for sentence in parts]
    return [sentence for sentence in words if sentence]


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDE], ids=of_page)
def test_sentences_are_short(page: Path) -> None:
    found = sentences(page)
    long = [" ".join(sentence) for sentence in found if len(sentence) > LONGEST_SENTENCE]
    assert not long, f"more than {LONGEST_SENTENCE} words"
    assert sum(map(len, found)) / len(found) < MEAN_SENTENCE


def test_the_readme_is_short() -> None:
    assert sum(map(len, sentences(ROOT / "README.md"))) <= README_WORDS


@pytest.mark.parametrize("page", PROSE, ids=of_page)
def test_lines_are_short(page: Path) -> None:
    lines = without_code(page.read_text()).splitlines()
    assert not [line for line in lines if len(line) > LONGEST_LINE and not line.startswith("|")]
