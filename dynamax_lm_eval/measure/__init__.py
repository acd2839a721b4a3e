"""What is measured on text before a run: which blocks to prune, which thresholds each exit should have."""
