"""The vocabulary of arguments, policies and results: words that stand for a choice. Imports nothing of the package."""

from __future__ import annotations

from typing import Literal

ConfidenceName = Literal["classifier", "softmax", "entropy", "state", "cascade"]


ClassifierKind = Literal["calm", "ffn", "mamba", "hybrid"]


StateMode = Literal["recompute", "learned", "copy", "copy_previous", "skip"]


ExitScope = Literal["generated", "all"]


Preset = Literal["paper", "thesis"]

#: Which tokens pruned blocks are left out for: all, or generated (or scored) ones alone.
PruneScope = Literal["all", "generated"]

#: What confirms a proposal of a cascade: the read-out's best probability, or what was fitted to it and the classifier.
Confirm = Literal["read_out", "fitted"]

#: What makes an exit right: its best token is among the full model's k best, or the other way round.
LabelKind = Literal["exit_in_full", "full_in_exit"]


MambaKernels = Literal["auto", "torch"]


PruneStrategy = Literal["deepest", "angular"]


BudgetStrategy = Literal["online", "two_pass"]
RooflineDevice = Literal["a100", "h100", "h200", "l40s", "rtx4090"]

#: The state mode of commands that leave it to the exits.
AUTO = "auto"
#: In place of a state mode: exits are drafts that the full model verifies.
VERIFY = "verify"

#: The classifier's confidence from which on a cascade reads out.
DEFAULT_PROPOSE = 0.5
