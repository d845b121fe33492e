"""Speculative decoding of transformers models and bare modules, without vLLM."""
