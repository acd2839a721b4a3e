"""Runs token ids through a backbone with early exits. Never sees a tokenizer, a task or the harness."""
