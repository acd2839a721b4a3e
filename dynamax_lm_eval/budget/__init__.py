"""Thresholds that follow a compute budget: the controller that decides, and the runner that asks it."""
