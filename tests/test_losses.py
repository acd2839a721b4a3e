"""What a document loses by exiting early."""

from __future__ import annotations

from helpers_harness import made_results, point

from dynamax_lm_eval.calibration.losses import LossKind


def test_metric_losses_are_what_the_full_model_had_and_the_exits_lost() -> None:
    task = made_results(4)
    full = point("full", "full model", [1.0, 1.0, 0.0, 0.0], 1.0, kind="full")
    ours = point("p", "a", [1.0, 0.0, 1.0, 0.0], 1.5)
    task.points[:] = [full, ours]
    kind = LossKind.find("metric", None, task)
    assert kind.of(task, ours).tolist() == [0, 1, 0, 0]
    assert kind.of(task, full).tolist() == [0, 0, 0, 0]
    name = kind.measured_by.partition(",")[0]
    full.higher_is_better = {name: False}
    assert kind.of(task, ours).tolist() == [0, 0, 1, 0]
