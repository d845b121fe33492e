"""Dependent documents: seeded text in which later text depends on distant earlier text."""

from qm_spec.training.dependent.document import Document, Span, write_jsonl
from qm_spec.training.dependent.generator import MIN_LENGTH, generate, generate_many
from qm_spec.training.dependent.kinds import KINDS

__all__ = ["KINDS", "MIN_LENGTH", "Document", "Span", "generate", "generate_many", "write_jsonl"]
