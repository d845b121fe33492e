"""Prompts: published files, generated documents, books and traces."""
