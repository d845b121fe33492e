"""Training: the reference target, the drafter, and the text the target writes for it."""
