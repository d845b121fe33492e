"""Acceptance without decoding: drafters replayed on what the target wrote."""
