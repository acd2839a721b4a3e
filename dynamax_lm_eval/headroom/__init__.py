"""How much early exit could save on a model, before anything is trained: read-outs, oracles, and what states cost."""
