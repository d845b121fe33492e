"""Measure acceptance and speed of speculative decoding in vLLM."""
