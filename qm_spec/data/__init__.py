"""Files of prompts, conversations and answers, as evaluation and training read them."""
