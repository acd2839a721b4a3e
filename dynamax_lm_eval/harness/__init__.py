"""Everything between lm-evaluation-harness and the engine: requests in, answers and compute out."""
