"""A results file as a page: one self-contained HTML file, and Markdown with its plots beside it."""
