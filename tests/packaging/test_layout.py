"""The rooms of the package: imports between them point one way."""

import ast
from pathlib import Path

import qm_spec

ROOT = Path(qm_spec.__file__).parent


def room_of(module: str) -> str:
    """`qm_spec.bench.report.render` is in bench/report; `qm_spec.config` and each file of the drafter are rooms."""
    _, *names = module.split(".")
    if names[:1] == ["drafter"]:
        while not ((path := ROOT.joinpath(*names)).is_dir() or path.with_suffix(".py").is_file()):
            names.pop()
        return "/".join(names)
    depth = 2 if names[:1] == ["bench"] and len(names) > 1 and (ROOT / "bench" / names[1]).is_dir() else 1
    return "/".join(names[:depth])


def arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        module = ".".join(["qm_spec", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qm_spec"):
                imported = {room_of(f"{node.module}.{one.name}") for one in node.names}
                found.setdefault(room_of(module), set()).update(imported - {room_of(module), ""})
    return found


def test_no_room_imports_what_imports_it():
    left = arrows()
    left.pop("", None)
    while left:
        lowest = [room for room, imported in left.items() if not imported & left.keys()]
        assert lowest, f"a circle among {sorted(left)}"
        for room in lowest:
            del left[room]
