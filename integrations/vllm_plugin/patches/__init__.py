"""All replaced code of vLLM: one file a patch, with the record, the function that takes its place and the reason."""
