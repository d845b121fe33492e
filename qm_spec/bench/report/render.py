"""Reports as files."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qm_spec.bench.report.acceptance_plots import acceptance_plots
from qm_spec.bench.report.content import Report, build_report
from qm_spec.bench.report.drawing import STYLE, Plot
from qm_spec.bench.report.measurements import Measurements
from qm_spec.bench.report.speed_plots import speed_plots
from qm_spec.bench.results.file import read_results
from qm_spec.bench.results.table import align_table

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"
_PLOT_FOLDER = "plots"
_DPI = 160
# Files that a measurement writes at once, each of the first plot that there is: over the context where that varies.
_OVERVIEW = {
    "speedup.png": ("speedup-by-context", "speedup"),
    "acceptance.png": ("acceptance-by-context", "acceptance-by-position"),
}


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` into a folder of results.

    Returns:
        The two files.

    Raises:
        FileNotFoundError: there is no `results.json` in it.
        ValueError: it is not a results file, or holds no runs.
    """
    report = build_report(read_results(folder))
    page = folder / HTML_NAME
    page.write_text(render_html(report), encoding="utf-8")
    return page, write_markdown(report, folder)


def render_html(report: Report) -> str:
    """Return the report as one page that loads nothing: its plots are images inside it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(report=report, drawn=_data_url)


def _data_url(plot: Plot) -> str:
    stream = io.BytesIO()
    _save(plot, stream, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _save(plot: Plot, file: Path | io.BytesIO, **how: Any) -> None:
    with matplotlib.rc_context(STYLE):
        plot.figure.savefig(file, dpi=_DPI, facecolor="white", **how)


def write_plots(results: dict[str, Any], folder: Path) -> None:
    """Write `speedup.png` and `acceptance.png`, of what there is to draw."""
    measurements = Measurements(results)
    with matplotlib.rc_context(STYLE):
        plots = {plot.name: plot for plot in (*speed_plots(measurements), *acceptance_plots(measurements))}
    for file, names in _OVERVIEW.items():
        if found := next((name for name in names if name in plots), None):
            _save(plots[found], folder / file, metadata={"Software": None})


def write_markdown(report: Report, folder: Path) -> Path:
    """Write `report.md` and its plots as PNG in `plots/`."""
    lines = [f"# {report.title}", "", report.subtitle, ""]
    lines += [f"- {fact.name}: **{fact.value}** ({fact.remark})" for fact in report.facts]
    lines += ["", *(f"> {warning}\n" for warning in report.warnings)]
    (folder / _PLOT_FOLDER).mkdir(exist_ok=True)
    for section in report.sections:
        lines += ["", f"## {section.title}", ""]
        for paragraph in section.paragraphs:
            lines += [paragraph, ""]
        lines += ["```sh", section.code, "```", ""] if section.code else []
        for table in section.tables:
            lines += [align_table(table.header, [[_in_cell(cell) for cell in row] for row in table.rows]), ""]
            lines += [table.caption, ""] if table.caption else []
        for plot in section.plots:
            file = folder / _PLOT_FOLDER / f"{plot.name}.png"
            _save(plot, file, metadata={"Software": None})
            lines += [f"### {plot.title}", "", f"![{plot.title}]({_PLOT_FOLDER}/{file.name})", "", plot.caption, ""]
    page = folder / MARKDOWN_NAME
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")
