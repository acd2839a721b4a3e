"""The table of classifier kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast, get_args

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.exits.classifier_options import ClassifierOptions
from dynamax_lm_eval.exits.classifiers.base import Classifier
from dynamax_lm_eval.exits.classifiers.calm import CalmClassifier
from dynamax_lm_eval.exits.classifiers.ffn import FfnClassifier
from dynamax_lm_eval.exits.classifiers.hybrid import HybridClassifier
from dynamax_lm_eval.exits.classifiers.mamba import MambaClassifier
from dynamax_lm_eval.types import ClassifierKind

#: Every kind, in the order in which training puts them into a checkpoint, whose first kind an evaluation prefers.
CLASSIFIERS: Mapping[ClassifierKind, type[Classifier]] = {
    "calm": CalmClassifier,
    "mamba": MambaClassifier,
    "hybrid": HybridClassifier,
    "ffn": FfnClassifier,
}


def make_classifier(kind: str, hidden_size: int, activation: str, options: ClassifierOptions) -> Classifier:
    """Returns a freshly initialised classifier; the global random stream decides its weights.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in CLASSIFIERS:
        raise UserError(f"classifier must be one of {', '.join(get_args(ClassifierKind))}, got {kind!r}")
    return CLASSIFIERS[cast(ClassifierKind, kind)].make(hidden_size, activation, options)
