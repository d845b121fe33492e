"""Writes docs/reference/cli.md from the options of `qm-spec`: `python docs/hooks/cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer.main

from qm_spec.cli import app
from qm_spec.cli.options import EXIT_BAD_INPUT, EXIT_FOUND_PROBLEM, EXIT_INTERRUPTED

PAGE = Path(__file__).resolve().parents[1] / "reference" / "cli.md"
HEAD = f"""\
# Command line

`qm-spec COMMAND --help` says the same, with examples. `make docs` writes this page from the code.

| exit code | means |
| --- | --- |
| 0 | done |
| {EXIT_FOUND_PROBLEM} | an engine failed, rows have errors, a package is missing, or a problem was found |
| {EXIT_BAD_INPUT} | options are wrong, or input cannot be used: stderr says what was expected, and the way out |
| {EXIT_INTERRUPTED} | interrupted |

"""


def commands() -> dict[str, Any]:
    """Return the commands of `qm-spec` by name, in the order of its help."""
    return dict(typer.main.get_group(app).commands)


def page() -> str:
    """Return the text of the page."""
    found = commands()
    rows = [f"| [`{name}`](#qm-spec-{name}) | {_cell(_summary(command))} |" for name, command in found.items()]
    table = "\n".join(["| command | what it does |", "| --- | --- |", *rows])
    return HEAD + table + "\n" + "".join(_section(name, command) for name, command in found.items())


def _section(name: str, command: Any) -> str:
    rows = [f"| {_names(one)} | {_default(one)} | {_cell(one.help or '')} |" for one in command.params]
    table = "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])
    return f"\n## qm-spec {name}\n\n{_summary(command)}\n\n{table}\n"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return _cell(parameter.show_default)
    if parameter.required:
        return "required"
    if parameter.default is False:
        return "off"
    if parameter.default in (None, (), []):
        return ""
    return f"`{parameter.default}`"


def _summary(command: Any) -> str:
    return " ".join(command.help.strip().split("\n\n")[0].split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
