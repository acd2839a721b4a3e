"""What a report computes beside the numbers of result files: once per task, joined to the table of points, shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from dynamax_lm_eval.reports import drafts
from dynamax_lm_eval.reports.paired import against_full, of_points, without_loops
from dynamax_lm_eval.reports.statistics import minus_pruning
from dynamax_lm_eval.sweep.results import TaskResults

#: The largest share of draws in which a line may be extended under an interval that is shown.
MOST_EXTENDED = 0.1
#: Columns of :func:`without_loops` in the table of points.
_WITHOUT = {
    "left_out": "loops_left_out",
    "difference": "score_difference_without_loops",
    "difference_low": "difference_low_without_loops",
    "difference_high": "difference_high_without_loops",
    "vs_full": "compute_vs_full_without_loops",
    "vs_full_low": "compute_vs_full_low_without_loops",
    "vs_full_high": "compute_vs_full_high_without_loops",
    "compute_reduction": "compute_reduction_without_loops",
    "rouge_l": "consistency_rouge_l_without_loops",
}


@dataclass(frozen=True)
class TaskNumbers:
    """What is computed of a task's points.

    Attributes:
        points: as :func:`of_points` returns it.
        pairs: by metric, as :func:`against_full` returns it.
        without: by metric, as :func:`without_loops` returns it.
        pruning: by metric, as :func:`minus_pruning` returns it.
    """

    points: pd.DataFrame
    pairs: dict[str, pd.DataFrame]
    without: dict[str, pd.DataFrame]
    pruning: dict[str, pd.DataFrame]

    @classmethod
    def of(cls, task: TaskResults, draws: int, seed: int) -> TaskNumbers:
        """Returns the numbers of a task, with intervals from so many draws of documents.

        Points that verify are not compared with the full model, whose texts theirs are.
        """
        compared = drafts.others(task)
        return cls(
            of_points(task, draws, seed),
            {metric: against_full(compared, metric, draws, seed) for metric in task.metrics},
            {metric: without_loops(compared, metric, draws, seed) for metric in task.metrics},
            {metric: minus_pruning(task, metric, draws, seed) for metric in task.metrics},
        )


def with_numbers(table: pd.DataFrame, numbers: Mapping[tuple[str, str], TaskNumbers]) -> pd.DataFrame:
    """Returns the table of points with what was computed of them; ``numbers``: by backbone and task."""
    of_points = [found.points.assign(backbone=name[0], task=name[1]) for name, found in numbers.items()]
    table = table.merge(pd.concat(of_points), how="left", on=["backbone", "task", "point"])
    difference = {"difference": "score_difference", "low": "difference_low", "high": "difference_high"}
    for parts, names in (
        ({name: found.pairs for name, found in numbers.items()}, difference),
        ({name: found.without for name, found in numbers.items()}, _WITHOUT),
        ({name: found.pruning for name, found in numbers.items()}, {}),
    ):
        found = [
            one.drop(columns="documents", errors="ignore").assign(
                backbone=backbone, task=task, metric=metric.partition(",")[0], filter=metric.partition(",")[2]
            )
            for (backbone, task), of_task in parts.items()
            for metric, one in of_task.items()
            if len(one)
        ]
        if found:
            joined = pd.concat(found).rename(columns=names)
            table = table.merge(joined, how="left", on=["backbone", "task", "point", "metric", "filter"])
    return table


def against_full_shown(task: TaskResults, metric: str, numbers: TaskNumbers) -> list[str]:
    """Returns the comparisons with the full model as Markdown, with and without texts that loop."""
    pairs, without = numbers.pairs[metric], numbers.without[metric]
    if not len(pairs):
        return []
    shown = pairs[["point", "difference", "low", "high", "test", "p_value", "p_holm"]]
    merged = shown.merge(numbers.points, on="point")
    merged["vs_full"] = merged["point"].map({point.name: task.vs_full(point) for point in task.points})
    columns = ["point", "difference", "test", "p_value", "p_holm", "vs_full", "median_reduction", "median_vs_full"]
    joined = {"difference": ("low", "high"), "vs_full": ("compute_vs_full_low", "compute_vs_full_high")}
    parts = [
        f"### Against the full model, {metric.partition(',')[0]}\n",
        f"On the same {len(task.full.samples)} documents, with 95 % intervals; p-values by McNemar's exact test or a "
        "paired bootstrap, and corrected over these points by Holm's method. `median_reduction` and `median_vs_full` "
        "are those of the median document:\n",
        markdown(_joined(merged, joined)[columns]),
    ]
    if len(without):
        columns = [name for name in without.columns if not name.endswith(("_low", "_high"))]
        joined = {name: (f"{name}_low", f"{name}_high") for name in ("difference", "vs_full") if name in without}
        parts += [
            "The same without the documents whose text ended at the token limit or in repetition, in the point's run "
            "or in the full model's (`left_out`):\n",
            markdown(_joined(without, joined)[columns]),
        ]
    return parts


def intervals(table: pd.DataFrame, value: str = "value") -> pd.DataFrame:
    """Returns a table with each value and its ``low`` and ``high`` in one column."""
    return _joined(table, {value: ("low", "high")}).drop(columns=["low", "high"])


def with_intervals(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Returns a table with these columns and their ``_low`` and ``_high`` in one column each."""
    return _joined(table, {name: (f"{name}_low", f"{name}_high") for name in names if name in table})


def _joined(table: pd.DataFrame, columns: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """Returns a table whose columns are texts with their intervals, where they have one."""

    def text(value: float, low: float, high: float) -> str:
        if pd.isna(value):
            return ""
        return f"{value:.3f}" if pd.isna(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"

    made = table.copy()
    for name, (low, high) in columns.items():
        if {low, high} <= {*table.columns}:
            triples = zip(table[name], table[low], table[high], strict=True)
            made[name] = [text(*triple) for triple in triples]
    return made


def settled(table: pd.DataFrame) -> pd.DataFrame:
    """Returns a table without the intervals that mostly follow from where lines were extended beyond their ends."""
    made = table.copy()
    made.loc[made["extended"] > MOST_EXTENDED, ["low", "high"]] = float("nan")
    return made


def markdown(table: pd.DataFrame) -> str:
    """Returns a table as Markdown; what is missing is empty."""
    told = table.astype(object).where(table.notna(), None)
    return str(told.to_markdown(index=False, floatfmt=".3f", missingval="")) + "\n"
