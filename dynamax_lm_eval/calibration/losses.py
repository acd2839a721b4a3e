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
    """What is lost.

    Attributes:
        name: ``consistency`` or ``metric``.
        measured_by: the likeness or the metric, as result files name it.
    """

    name: str
    measured_by: str

    @classmethod
    def chosen(cls, name: str, measured_by: str | None, task: TaskResults) -> LossKind:
        """The loss of this name that the task has.

        Args:
            name: ``consistency`` or ``metric``.
            measured_by: what the user named, without its filter; None: the usual one.
            task: answers of the full model at least.

        Raises:
            UserError: the task has no such loss, or one that does not lie in [0, 1].
        """
        if name == "consistency":
            known = list(task.full.likeness)
            wanted = f"consistency_{measured_by}" if measured_by is not None else None
            found = wanted or next((key for key in ("consistency_rouge_l", "consistency_exact") if key in known), None)
        else:
            known = [metric for metric in task.metrics if metric not in task.full.likeness]
            named = {metric.partition(",")[0]: metric for metric in reversed(known)}
            found = named.get(measured_by, measured_by) if measured_by is not None else next(iter(known), None)
        if found not in known:
            names = ", ".join(key.partition(",")[0].removeprefix("consistency_") for key in known) or "none"
            raise UserError(f"{task.title} has no {name} loss by {measured_by or 'default'}; it has {names}")
        kind = cls(name, found)
        kind._values(task, task.full)
        return kind

    def of(self, task: TaskResults, point: PointResult) -> Floats:
        """Loss of every document (n,)."""
        ours = self._values(task, point)
        if self.name == "consistency":
            return np.clip(1 - ours, 0.0, 1.0)
        lost = self._values(task, task.full) - ours
        return np.maximum(lost if task.higher_is_better(self.measured_by) else -lost, 0.0)

    def _values(self, task: TaskResults, point: PointResult) -> Floats:
        found = point.per_document(self.measured_by)
        name = self.measured_by.partition(",")[0]
        if found is None:
            raise UserError(f"{task.title}: {name} is no mean over documents; choose another --metric, or --loss")
        if not (np.isfinite(found).all() and found.min() >= -1e-9 and found.max() <= 1 + 1e-9):
            raise UserError(f"{task.title}: {name} does not lie in [0, 1]; choose another --metric, or --loss")
        return np.clip(found, 0.0, 1.0)


def loss_matrix(kind: LossKind, task: TaskResults, points: Sequence[PointResult]) -> Floats:
    """(C, n): losses of every document at every candidate."""
    return np.stack([kind.of(task, point) for point in points])
