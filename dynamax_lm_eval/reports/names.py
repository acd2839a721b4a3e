"""What metrics, axes and settings are called where people read them, and the metric that a task begins with."""

from __future__ import annotations

import numpy as np

from dynamax_lm_eval.sweep.baselines import PRUNING, STATIC
from dynamax_lm_eval.sweep.results import PointResult, TaskResults

#: Shown beside each task's own metric.
SIMILARITY = "consistency_rouge_l"
#: Scores that differ by less are one.
_SAME = 1e-9
#: Metrics of the harness and ours, without their filters.
_METRICS = {
    "exact_match": "Exact match",
    "em": "Exact match",
    "f1": "F1",
    "acc": "Accuracy",
    "acc_norm": "Accuracy, by length",
    "acc_bytes": "Accuracy, by bytes",
    "mcc": "Matthews correlation",
    "brier_score": "Brier score",
    "perplexity": "Perplexity",
    "word_perplexity": "Perplexity per word",
    "byte_perplexity": "Perplexity per byte",
    "bits_per_byte": "Bits per byte",
    "bleu": "BLEU",
    "consistency_exact": "Same text as the full model",
    "consistency_token_f1": "Token F1 with the full model",
    "consistency_rouge_l": "ROUGE-L with the full model",
}
#: TruthfulQA compares an answer with true and with false references, by several similarities.
_SIMILARITIES = {"bleu": "BLEU", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bleurt": "BLEURT"}
_OF_SIMILARITY = {
    "max": "{} with the closest true answer",
    "acc": "Closer to true answers, by {}",
    "diff": "{}, true minus false answers",
}
#: Begins a task that has it: similarities to references (``bleu_max``) rate long repetitions higher than answers.
_PREFERRED = ("rougeL_acc",)


def metric_name(metric: str, metrics: list[str] | None = None) -> str:
    """Returns what a metric (with its filter) is called; with the filter where ``metrics`` has it under several."""
    name, _, harness_filter = metric.partition(",")
    similarity, _, part = name.rpartition("_")
    if name in _METRICS:
        shown = _METRICS[name]
    elif similarity in _SIMILARITIES and part in _OF_SIMILARITY:
        shown = _OF_SIMILARITY[part].format(_SIMILARITIES[similarity])
    else:
        shown = name.replace("_", " ")
    several = sum(other.partition(",")[0] == name for other in metrics or ()) > 1
    return f"{shown} ({harness_filter})" if several else shown


def first_metric(task: TaskResults) -> str:
    """Returns the metric (with its filter) that a task is shown by where none is asked for."""
    names = {metric.partition(",")[0]: metric for metric in reversed(task.metrics)}
    return next((names[name] for name in _PREFERRED if name in names), task.metrics[0])


def is_flat(task: TaskResults, metric: str) -> bool:
    """Says whether a metric has one value at all points, of two at least, and in each document where it is a mean."""
    values = [point.scores[metric][0] for point in task.points]
    if len(values) < 2 or max(values) - min(values) > _SAME:
        return False
    whole = task.full.per_document(metric)
    own = [point.per_document(metric) for point in task.points[1:]]
    return whole is None or all(found is None or np.allclose(found, whole, atol=_SAME) for found in own)


def opening_metric(task: TaskResults, metric: str) -> str:
    """Returns the metric that a page opens a task with in place of ``metric``: the first one that tells points apart.

    The similarity to the full model's answers comes before the task's other metrics; ``metric`` where none varies.
    """
    return next(
        (name for name in (metric, SIMILARITY, *task.metrics) if name in task.metrics and not is_flat(task, name)),
        metric,
    )


def flat_line(task: TaskResults, metric: str) -> str:
    """Returns a sentence that says that a metric has one value."""
    name = metric_name(metric, task.metrics)
    return f"{name} is {task.full.scores[metric][0]:.3f} at every point"


def setting(point: PointResult, is_short: bool = False) -> str:
    """Returns what tells a point from others of its line, for people; short: as it stands beside a marker."""
    value = f"{point.x:g}"
    if point.kind == PRUNING:
        return f"{value} block{'s' * (point.x != 1)}" + ("" if is_short else " pruned")
    if point.kind == STATIC:
        return f"exit {value}"
    return value if is_short else f"threshold {value}"
