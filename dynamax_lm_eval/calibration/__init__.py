"""Thresholds with a guarantee: tests, certificates, the command that makes them."""
