"""The program `qm-spec`, also `python -m qm_spec`."""

from __future__ import annotations

from importlib.util import find_spec


def main() -> None:
    """Run the command line; without the packages it is made of, exit with a sentence that names them."""
    if find_spec("typer") is None:
        raise SystemExit("qm-spec: the command line needs typer; install it with: pip install 'qm_spec[train]'")
    from qm_spec.cli import app

    app(prog_name="qm-spec")


if __name__ == "__main__":
    main()
