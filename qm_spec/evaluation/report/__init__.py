"""A results file as a page: one self-contained HTML file, and Markdown with its plots beside it."""

from qm_spec.evaluation.report.content import Report, build_report
from qm_spec.evaluation.report.render import render_html, write_markdown, write_report

__all__ = ["Report", "build_report", "render_html", "write_markdown", "write_report"]
