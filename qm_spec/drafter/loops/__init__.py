"""Ways to run the K draft steps: over gathered entries, over pages, and captured in graphs."""
