"""The program `qm-spec`, also `python -m qm_spec`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line; wrong input and missing packages end it with a sentence, not a traceback."""
    if find_spec("typer") is None:
        raise SystemExit("qm-spec: the command line needs typer; install it with: pip install 'qm_spec[train]'")
    from qm_spec.cli import app
    from qm_spec.cli.options import EXIT_BAD_INPUT

    try:
        app(prog_name="qm-spec")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from error


if __name__ == "__main__":
    main()
