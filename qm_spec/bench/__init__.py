"""What `qm-spec eval`, `generate`, `data`, `compare` and `report` are made of."""
