"""Fewer tokens for other models: key/value caches, vision and text, prompt embeddings, diffusion features."""
