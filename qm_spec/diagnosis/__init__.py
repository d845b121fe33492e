"""What `qm-spec doctor` and `qm-spec inspect` find: the installation, the plug-in, a target and its drafter."""
