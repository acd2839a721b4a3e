"""Counting compute: what a token costs, and who spent what. Pure functions and sums; no tensors."""
