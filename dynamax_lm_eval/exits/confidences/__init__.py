"""Confidences: how sure an exit is, as a number that a threshold is compared with.

A confidence is one file here, one line in the table, and its word in ``types.ConfidenceName``. Knows logits, hidden
states and classifiers; does not know thresholds or who exits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from dynamax_lm_eval.exits.confidences.base import Confidence, ExitInputs, LogitsConfidence
from dynamax_lm_eval.exits.confidences.cascade import CascadeConfidence
from dynamax_lm_eval.exits.confidences.entropy import EntropyConfidence
from dynamax_lm_eval.exits.confidences.softmax import SoftmaxConfidence
from dynamax_lm_eval.exits.confidences.state import StateConfidence
from dynamax_lm_eval.exits.confidences.trained import TrainedConfidence
from dynamax_lm_eval.types import ClassifierKind, ConfidenceName, Confirm

__all__ = ["CONFIDENCES", "CascadeConfidence", "Confidence", "ExitInputs", "LogitsConfidence", "resolve_confidence"]

#: Every confidence by the name that a policy gives it.
CONFIDENCES: Mapping[ConfidenceName, type[Confidence]] = {
    "classifier": TrainedConfidence,
    "softmax": SoftmaxConfidence,
    "entropy": EntropyConfidence,
    "state": StateConfidence,
    "cascade": CascadeConfidence,
}


@functools.cache
def resolve_confidence(
    name: ConfidenceName,
    classifier: ClassifierKind | None = None,
    vocab_subset: int | None = None,
    propose: float | None = None,
    confirm: Confirm = "read_out",
) -> Confidence:
    """The confidence that a policy names, the same object every time; the rest is as in :meth:`Confidence.make`.

    ``propose``: of a cascade, the classifier's confidence from which on a token is read out; ``confirm``: what of the
    read-out then decides.
    """
    if name == "cascade":
        assert classifier is not None and propose is not None, "a cascade has both"
        return CascadeConfidence(classifier, propose, vocab_subset, confirm)
    return CONFIDENCES[name].make(classifier, vocab_subset)
