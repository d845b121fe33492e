"""What a command runs: a benchmark, a file of prompts to generate from, prompts to answer for training."""
