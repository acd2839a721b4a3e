"""Training exits for a frozen backbone: data, targets, the loop, and what it measures at the end."""
