"""What of the differences between points is rounding: the full model twice, with other numbers of sequences at once.

The floor of a number is how far it moves per document between the two runs, as a mean of absolute changes: changes of
single documents cancel in a score by chance, and need not cancel under a point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dynamax_lm_eval.sweep.results import PointResult, TaskResults

#: Numbers that were summed in another order than the floor was.
_EXACT = 1e-9
_COMPUTE = "compute_vs_full"
#: Types of fewer bits than float32, as result files name them.
_HALF = ("bfloat16", "float16")


def floor(task: TaskResults) -> dict[str, float]:
    """Returns how far each metric, each likeness and ``compute_vs_full`` moves by rounding; empty without a second run.

    Of several second runs the largest. A metric that is no mean over documents moves by the difference of its values.
    """
    floors: dict[str, float] = {}
    for again in task.again:
        for name, (_, _, moved) in _compared(task, again).items():
            floors[name] = max(floors.get(name, 0.0), moved)
    return floors


def within(task: TaskResults, floors: Mapping[str, float], point: PointResult, metric: str) -> str | None:
    """Returns in what a point is no further from the full model than rounding: score, answers, compute; None: nothing.

    Args:
        task: the results.
        floors: as :func:`floor` returns them; not empty.
        point: not the full model.
        metric: the score, with its filter.
    """
    found = []
    if abs(point.scores[metric][0] - task.full.scores[metric][0]) <= floors[metric] + _EXACT:
        found.append("score")
    if point.similarity and all(1 - mean <= floors[name] + _EXACT for name, mean in point.consistency.items()):
        found.append("answers")
    if abs(task.vs_full(point) - 1) <= floors[_COMPUTE] + _EXACT:
        found.append("compute")
    return ", ".join(found) or None


def column(results: Sequence[TaskResults], table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table of points with the column ``within_noise``, where any sweep has a second run."""
    found: dict[tuple[str, str, str, str], str | None] = {}
    for task in results:
        if not (floors := floor(task)):
            continue
        for point in task.points[1:]:
            for metric in task.metrics:
                found[task.backbone, task.task, point.name, metric] = within(task, floors, point, metric)
    if not found:
        return table
    keys = zip(table["backbone"], table["task"], table["point"], table["metric"] + "," + table["filter"], strict=True)
    return table.assign(within_noise=[found.get(key) for key in keys])


def section(task: TaskResults, metric: str) -> list[str]:
    """Returns what a report says of the noise floor of a task, as Markdown; ``metric``: the one it is shown by."""
    full = task.full
    if not (floors := floor(task)):
        if full.dtype not in _HALF:
            return []
        return [
            f"Computed in {full.dtype}, and without a second run of the full model: how much of the differences is "
            "rounding is not known. `sweep --noise_rows` makes one.\n"
        ]
    parts = ["### Noise floor\n"]
    for again in task.again:
        compared = {name: numbers for name, numbers in _compared(task, again).items() if _is_shown(name, metric, task)}
        table = pd.DataFrame(
            [
                {
                    "": name.partition(",")[0],
                    "first run": first,
                    "second run": second,
                    "difference": second - first,
                    "per document": moved,
                }
                for name, (first, second, moved) in compared.items()
            ]
        )
        parts += [
            f"The full model in {full.dtype}, once more with {again.rows} sequences at once in place of {full.rows}. "
            "What differs is rounding; the last column is the mean of absolute changes of documents, which do not "
            "cancel:\n",
            str(table.to_markdown(index=False, floatfmt=".4f")) + "\n",
        ]
    if not any(floors.values()):
        return [*parts, "Both runs gave the same answers.\n"]
    lost = [f"{floors[name]:.4f} of what {name} lacks of 1" for name in full.similarity]
    shares = ", ".join([*lost, f"{floors[_COMPUTE]:.4f} of the distance of {_COMPUTE} from 1"])
    parts.append(f"Rounding may account, at every point, for {shares}.\n")
    marked: dict[str, list[str]] = {}
    for point in task.points[1:]:
        if what := within(task, floors, point, metric):
            marked.setdefault(what, []).append(point.name)
    if not marked:
        return [*parts, "No point is within it.\n"]
    lines = [
        f"- in {what}: {', '.join(names)}" for what, names in sorted(marked.items(), key=lambda item: -len(item[0]))
    ]
    return [*parts, "Points within it, no further from the full model than it is from itself:\n", "\n".join(lines), ""]


def _is_shown(name: str, metric: str, task: TaskResults) -> bool:
    return name in (metric, _COMPUTE) or name in task.full.similarity


def _compared(task: TaskResults, again: PointResult) -> dict[str, tuple[float, float, float]]:
    """Returns of each number its first and second value, and how far it moves per document."""
    compared = {}
    for name in task.metrics:
        first, second = task.full.per_document(name), again.per_document(name)
        values = task.full.scores[name][0], again.scores[name][0]
        moved = abs(values[1] - values[0])
        if first is not None and second is not None:
            moved = max(moved, float(np.abs(second - first).mean()))
        compared[name] = (*values, moved)
    first, second = task.full.macs("total"), again.macs("total")
    ratio = task.vs_full(again)
    compared[_COMPUTE] = (1.0, ratio, max(abs(ratio - 1), float(np.abs(second - first).sum() / first.sum())))
    return compared
