"""Losses of documents in [0, 1], from answers that a sweep kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynamax_lm_eval.calibration.testing import Floats
from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.sweep.results import PointResult, TaskResults


@dataclass(frozen=True)
class LossKind:
    """One way of saying how much a document loses.

    Attributes:
        name: ``consistency`` or ``metric``.
        measured_by: the similarity or the metric, as result files name it.
    """

    name: str
    measured_by: str

    @classmethod
    def find(cls, name: str, measured_by: str | None, task: TaskResults) -> LossKind:
        """Returns the loss of this name that the task has.

        Args:
            name: ``consistency`` or ``metric``.
            measured_by: what the user named, without its filter; None: the usual one.
            task: answers of the full model at least.

        Raises:
            UserError: the task has no such loss, or one that does not lie in [0, 1].
        """
        if name == "consistency":
            measures = list(task.full.similarity)
            usual = next((key for key in ("consistency_rouge_l", "consistency_exact") if key in measures), None)
            measure = f"consistency_{measured_by}" if measured_by is not None else usual
        else:
            measures = [metric for metric in task.metrics if metric not in task.full.similarity]
            by_name = {metric.partition(",")[0]: metric for metric in reversed(measures)}
            measure = by_name.get(measured_by, measured_by) if measured_by is not None else next(iter(measures), None)
        if measure is None or measure not in measures:
            names = ", ".join(key.partition(",")[0].removeprefix("consistency_") for key in measures) or "none"
            raise UserError(f"{task.title} has no {name} loss by {measured_by or 'default'}; it has {names}")
        kind = cls(name, measure)
        kind._values(task, task.full)
        return kind

    def of(self, task: TaskResults, point: PointResult) -> Floats:
        """Returns the losses of all documents, (n,)."""
        ours = self._values(task, point)
        if self.name == "consistency":
            return np.clip(1 - ours, 0.0, 1.0)
        lost = self._values(task, task.full) - ours
        return np.maximum(lost if task.higher_is_better(self.measured_by) else -lost, 0.0)

    def _values(self, task: TaskResults, point: PointResult) -> Floats:
        """Returns what the loss is measured by of all documents, (n,).

        Raises:
            UserError: it is no mean over documents, or does not lie in [0, 1].
        """
        values = point.per_document(self.measured_by)
        name = self.measured_by.partition(",")[0]
        if values is None:
            raise UserError(f"{task.title}: {name} is no mean over documents; choose another --metric, or --loss")
        if not (np.isfinite(values).all() and values.min() >= -1e-9 and values.max() <= 1 + 1e-9):
            raise UserError(f"{task.title}: {name} does not lie in [0, 1]; choose another --metric, or --loss")
        return np.clip(values, 0.0, 1.0)


def loss_matrix(kind: LossKind, task: TaskResults, points: Sequence[PointResult]) -> Floats:
    """Returns the losses of all documents at all candidates, (C, n)."""
    return np.stack([kind.of(task, point) for point in points])
