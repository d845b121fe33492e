"""The vLLM plug-in: the drafter as a draft model, and how a user names it."""
