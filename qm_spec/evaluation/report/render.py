"""Reports as files."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qm_spec.evaluation.methods import palette
from qm_spec.evaluation.report.content import Report, build_report
from qm_spec.evaluation.report.drawing import DARK_PALETTE, Plot
from qm_spec.evaluation.report.svg import STYLE, inline_svg
from qm_spec.evaluation.results import read_results
from qm_spec.evaluation.table import align_table

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"
_PLOT_FOLDER = "plots"
_DPI = 160


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
    """Return the report as one page that loads nothing: plots are SVG in the page's own font and colours."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    variables = {colour: f"--series-{place}" for place, colour in enumerate(palette())}
    colours = {colour: f"var({variable})" for colour, variable in variables.items()}

    def drawn(plot: Plot) -> Markup:
        return Markup(inline_svg(plot.figure, plot.name, f"{plot.title}. {plot.caption}", colours))

    return environment.get_template("page.html").render(
        report=report,
        drawn=drawn,
        light={variable: colour for colour, variable in variables.items()},
        dark={variables[colour]: other for colour, other in DARK_PALETTE.items()},
    )


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
            with matplotlib.rc_context(STYLE):
                plot.figure.savefig(file, dpi=_DPI, facecolor="white", metadata={"Software": None})
            lines += [f"### {plot.title}", "", f"![{plot.title}]({_PLOT_FOLDER}/{file.name})", "", plot.caption, ""]
    page = folder / MARKDOWN_NAME
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")
