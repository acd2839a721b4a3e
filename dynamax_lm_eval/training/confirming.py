"""Confirmers of trained exits: how they are fitted, and what they know on held-out text.

n labelled tokens, E exits, T held-out tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.exits.confirmers import Confirmer, features
from dynamax_lm_eval.frozen.observe import BoolArray, Observations
from dynamax_lm_eval.training.evaluation import auroc

#: Inverse of the penalty on weights of standardised features: next to none.
_INVERSE_PENALTY = 10.0


def fit_confirmer(confirmer: Confirmer, log_odds: Tensor, two_best: Tensor, labels: BoolArray) -> None:
    """Fits a confirmer, in place, to labels (n,); one whose labels are equal stays the read-out's probability.

    Args:
        confirmer: of a kind of classifier at an exit.
        log_odds: (n,) of "exit", by that classifier.
        two_best: (n, 2) probabilities of the read-out's two best tokens.
        labels: (n,) whether the exit was right.
    """
    if labels.all() or not labels.any():
        confirmer.reset()
        return
    known = features(log_odds, two_best).double().numpy()
    mean, spread = known.mean(0), known.std(0) + 1e-6
    model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000).fit((known - mean) / spread, labels)
    weight = model.coef_[0] / spread
    confirmer.weight.copy_(torch.from_numpy(weight))
    confirmer.bias.copy_(torch.tensor(float(model.intercept_[0] - weight @ mean)))


def report(seen: Observations, classifiers: ExitClassifiers) -> dict[str, Any]:
    """Returns AUROC on held-out text, as JSON data: of the read-out alone, and of the confirmers by kind; by exit."""
    assert seen.two_best is not None
    found: dict[str, Any] = {"read_out": {}, **{kind: {} for kind in classifiers.kinds}}
    for i, layer in enumerate(classifiers.exit_layers):
        right, two_best = seen.within_k[i], seen.two_best[:, i]
        found["read_out"][str(layer)] = auroc(two_best[0], right)
        for kind in classifiers.kinds:
            sure = classifiers.confirmer(kind, layer).of_arrays(seen.confidences[kind][i], two_best)
            found[kind][str(layer)] = auroc(sure, right)
    return found
