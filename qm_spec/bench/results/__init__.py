"""What was measured: files, metrics, intervals, comparisons and tables."""
