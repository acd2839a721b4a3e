"""The help of ``run``: our words, then the options of the harness, as its own parser declares them."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from dynamax_lm_eval.errors import UserError

_USAGE = "dynamax-lm-eval run --model_args backbone=NAME,threshold=0.8 --tasks TASK [TASK ...] [options]"
_DESCRIPTION = """\
Evaluate a model with early exits: lm-evaluation-harness with --model dynamax, and this package's tasks at hand.

model arguments (name=value, separated by commas; `dynamax-lm-eval arguments` shows all, `... arguments NAME` one):
  backbone      alias (smollm2-gguf, tiny-llama, mistral, ...), Hub id or folder of the model
  threshold     a token exits where the confidence reaches it: 0.8, one per exit (0.7+0.8+0.9), or 1 for the full
                model (default: 0.8)
  exits         trained exits, a folder or Hub id (default: those of the backbone, if there are some)
  confidence    classifier, softmax, entropy, state or cascade (default: classifier with trained exits, else softmax)
  state_mode    what an exited token leaves in the cache of the blocks it skipped: recompute, learned, copy, skip, ...
  exit_layers   block counts after which a token may exit, e.g. [16,20,24,28] (default: those of the exits)
  prune_layers  the baseline: so many blocks before the last one are disabled
  verify        true: the full model's text, with exits as drafts
  dtype, device, revision, peft, max_length and others are those of --model hf
"""
_EPILOG = """\
examples:
  dynamax-lm-eval run --model_args backbone=tiny-llama,threshold=0.8 --tasks trivia_demo --device cpu
  dynamax-lm-eval run --model_args backbone=smollm2-gguf,threshold=0.8 --tasks trivia_demo --output_path out
  dynamax-lm-eval run --config run.yaml

Our tasks: dynamax-lm-eval tasks. All of the harness's: lm_eval ls tasks.
--debug shows all log lines, and where an error comes from.
"""
#: Help of the harness that says something else here.
_CHANGED = {
    "model": "model (default: dynamax)",
    "tasks": "tasks, groups or tags, separated by spaces or commas",
    "model_args": "see above",
    "include_path": "folder with tasks of your own, beside this package's",
}


def adapt(harness: argparse.ArgumentParser, run: argparse.ArgumentParser) -> None:
    """Gives the harness's parser of ``run`` our words, and lets errors of both end in a UserError, one line."""
    run.prog, run.usage = "dynamax-lm-eval run", _USAGE
    run.description, run.epilog = _DESCRIPTION, _EPILOG
    for action in run._actions:
        action.help = _CHANGED.get(action.dest, action.help)
    known = sorted(name for action in run._actions for name in action.option_strings)

    def refuse(message: str) -> NoReturn:
        # Only here does argparse name what it does not know; elsewhere the option was right, and its value was not.
        words = message.split() if message.startswith("unrecognized arguments") else []
        unknown = next((word for word in words if word.startswith("--") and word not in known), None)
        nearest = difflib.get_close_matches(unknown or "", known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else "see dynamax-lm-eval run --help"
        raise UserError(f"{message}; {hint}")

    for parser in (harness, run):
        parser.error = refuse  # type: ignore[method-assign]
