"""Calibration of trained confidences, so that one threshold means one thing at all exits.

Platt scaling (Platt 1999; temperature scaling of Guo et al. 2017, arXiv 1706.04599, with a bias): at every exit the
log-odds z of "exit" become a z + b with the a and b under which labels of text that was not trained on are most
probable. Both are folded into the classifier's last layer, so that a run does nothing more than before, and a > 0
keeps the order of confidences at an exit.

Where exits have confirmers, these are fitted to the same tokens, to the calibrated classifiers and the read-outs.

n labelled tokens, E exits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynamax_lm_eval.exits.classifiers import ExitClassifiers
from dynamax_lm_eval.frozen.observe import BoolArray, FloatArray, Observations
from dynamax_lm_eval.frozen.passes import FrozenPass
from dynamax_lm_eval.training.batches import labelled
from dynamax_lm_eval.training.confirming import fit_confirmer
from dynamax_lm_eval.training.evaluation import calibration_error

logger = logging.getLogger(__name__)

_MOST_STEPS = 100


class Scaling(NamedTuple):
    """What log-odds z become: ``scale`` z + ``shift``."""

    scale: float
    shift: float

    def undone(self, confidences: FloatArray) -> FloatArray:
        """Returns the confidences (T,) that were before."""
        with np.errstate(divide="ignore"):
            log_odds = np.log(confidences) - np.log1p(-confidences)
        return _sigmoid((log_odds - self.shift) / self.scale)


#: By kind and exit layer; None: the exit was left as it is.
Scalings = dict[str, dict[int, Scaling | None]]


def fit_scaling(log_odds: FloatArray, labels: BoolArray) -> Scaling | None:
    """Returns the scaling under which labels (n,) are most probable, by Newton's method in float64.

    Labels are Platt's: (n1 + 1) / (n1 + 2) for n1 positive ones and 1 / (n0 + 2) for n0 others, without which
    confidences that part all labels would be scaled without end. None where the scale is not above 0 or not finite, or
    where all labels are equal.
    """
    positive = int(labels.sum())
    if not 0 < positive < len(labels):
        return None
    targets = np.where(labels, (positive + 1) / (positive + 2), 1 / (len(labels) - positive + 2))
    inputs = np.stack([log_odds, np.ones_like(log_odds)])  # (2, n)
    found = np.asarray([1.0, 0.0])
    loss = _loss(found @ inputs, targets)
    for _ in range(_MOST_STEPS):
        probability = _sigmoid(found @ inputs)
        gradient = inputs @ (probability - targets)
        curvature = (inputs * (probability * (1 - probability))) @ inputs.T + 1e-12 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-10 and _loss((found - size * step) @ inputs, targets) > loss:
            size /= 2
        if size <= 1e-10:
            break  # as good as it gets in float64
        found = found - size * step
        loss = _loss(found @ inputs, targets)
        if np.abs(step).max() < 1e-12 * (1 + np.abs(found).max()):
            break
    scale, shift = float(found[0]), float(found[1])
    return Scaling(scale, shift) if scale > 0 and math.isfinite(scale) and math.isfinite(shift) else None


@torch.no_grad()
def calibrate(frozen: FrozenPass, classifiers: ExitClassifiers, batches: Iterable[Sequence[Sequence[int]]]) -> Scalings:
    """Calibrates all classifiers, in place, on batches of rows; of answers, on what may leave.

    The rows run at full depth, as those of the evaluation do.
    """
    labels: list[Tensor] = []  # (E, n) each
    two_best: list[Tensor] = []  # (E, n, 2) each
    confirms = len(classifiers.confirmers) > 0
    log_odds: dict[str, list[Tensor]] = {kind: [] for kind in classifiers.kinds}
    for rows in batches:
        batch = frozen.run(rows)
        positions = torch.from_numpy(np.flatnonzero(labelled(rows))).to(frozen.backbone.device)
        if len(positions) == 0:
            continue
        label = frozen.label(batch, positions, classifiers, two_best=confirms)
        labels.append(label.within_k.cpu())
        if label.two_best is not None:
            two_best.append(label.two_best.cpu())
        for kind in classifiers.kinds:
            by_exit = [
                batch.classified(classifiers.at(kind, layer), layer, positions).double().cpu()
                for layer in frozen.exit_layers
            ]
            log_odds[kind].append(torch.stack([logits[:, 1] - logits[:, 0] for logits in by_exit]))
    found: Scalings = {}
    for kind, parts in log_odds.items():
        found[kind] = {}
        for i, layer in enumerate(frozen.exit_layers):
            scaling = None
            if labels:
                z, right = (torch.cat([part[i] for part in these]).numpy() for these in (parts, labels))
                scaling = fit_scaling(z, right)
                if confirms:
                    scaled = z if scaling is None else scaling.scale * z + scaling.shift
                    surest = torch.cat([part[i] for part in two_best])
                    fit_confirmer(classifiers.confirmer(kind, layer), torch.from_numpy(scaled), surest, right)
            found[kind][layer] = scaling
            if scaling is None:
                logger.warning(
                    "%s at exit layer %d is left uncalibrated: its labels are equal, or it is no surer of right ones",
                    kind,
                    layer,
                )
            else:
                logger.info("%s at exit layer %d: log-odds z become %.3f z %+.3f", kind, layer, *scaling)
                classifiers.at(kind, layer).rescale(*scaling)
    return found


def report(scalings: Scalings, seen: Observations, exit_layers: Sequence[int]) -> dict[str, Any]:
    """Returns by kind and exit layer, as JSON data, what was done, and the error on held-out text without it.

    ``seen``: what the calibrated exits showed there.
    """
    return {
        kind: {str(layer): _line(by_layer[layer], seen, kind, i) for i, layer in enumerate(exit_layers)}
        for kind, by_layer in scalings.items()
    }


def _line(scaling: Scaling | None, seen: Observations, kind: str, exit_number: int) -> dict[str, float] | None:
    if scaling is None:
        return None
    before = scaling.undone(seen.confidences[kind][exit_number])
    error = calibration_error(before, seen.within_k[exit_number])
    return {**scaling._asdict(), "expected_calibration_error_before": error}


def _loss(log_odds: FloatArray, targets: FloatArray) -> float:
    """Returns the negative log-likelihood of targets (n,)."""
    return float((np.logaddexp(0, log_odds) - targets * log_odds).sum())


def _sigmoid(log_odds: FloatArray) -> FloatArray:
    return np.exp(-np.logaddexp(0, -log_odds))
