"""The vocabulary of arguments, policies and results: words that stand for a choice. Imports nothing of the package."""

from __future__ import annotations

from typing import Literal

ConfidenceName = Literal["classifier", "softmax", "entropy", "state"]


ClassifierKind = Literal["calm", "ffn", "mamba", "hybrid"]


StateMode = Literal["recompute", "learned", "copy", "skip"]


ExitScope = Literal["generated", "all"]


Preset = Literal["paper"]


MambaKernels = Literal["auto", "torch"]


PruneStrategy = Literal["deepest", "angular"]


BudgetStrategy = Literal["online", "two_pass"]
