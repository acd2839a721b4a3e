"""Counts of compute: what a token costs, and what each request spent. Pure functions and sums; no tensors."""
