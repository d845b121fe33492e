"""QuickMerge++ speculative decoding for vLLM."""
