"""The drafter: checkpoint config, the prior, its merged memory, losses and the draft loop."""
