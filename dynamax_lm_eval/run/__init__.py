"""``dynamax-lm-eval run``: the harness's command with our model, our tasks and our help; and the table of arguments."""
