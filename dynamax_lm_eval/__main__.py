"""``python -m dynamax_lm_eval`` is the command ``dynamax-lm-eval``."""

import sys

from dynamax_lm_eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
