"""Results in the formats of other readers."""
