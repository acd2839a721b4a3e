"""Exit classifiers: small networks on the hidden state at an exit layer, each giving the probability of "exit".

A kind is one file here, one line in :mod:`kinds`, and its word in ``types.ClassifierKind``. Knows hidden states of flat
ragged rows; knows no thresholds, policies or files.
"""

from dynamax_lm_eval.exits.classifier_options import ClassifierOptions
from dynamax_lm_eval.exits.classifiers.base import Classifier, exit_probability
from dynamax_lm_eval.exits.classifiers.collection import ExitClassifiers
from dynamax_lm_eval.exits.classifiers.kinds import CLASSIFIERS, make_classifier

__all__ = [
    "CLASSIFIERS",
    "Classifier",
    "ClassifierOptions",
    "ExitClassifiers",
    "exit_probability",
    "make_classifier",
]
