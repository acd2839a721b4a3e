"""When a token leaves: confidences and policies. Knows hidden states, not how they were made."""
