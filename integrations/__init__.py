"""What connects qm_spec to inference engines; installed as `qm_spec.integrations`."""
