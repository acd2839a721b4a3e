"""One HTML page that needs nothing else: curves, the points behind them, and texts with their exit layers."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dynamax_lm_eval.reports import drafts, noise, runs, texts
from dynamax_lm_eval.reports.curves import (
    COLOURS,
    joined,
    labelled,
    pareto_front,
    place,
    reduction_range,
    score_range,
)
from dynamax_lm_eval.reports.names import first_metric, flat_line, is_flat, metric_name, setting
from dynamax_lm_eval.reports.options import ReportOptions
from dynamax_lm_eval.reports.statistics import AXES
from dynamax_lm_eval.reports.tables import TaskNumbers
from dynamax_lm_eval.sweep.results import PointResult, TaskResults

_ASSETS = Path(__file__).parent / "assets"
#: Joined in this order into one script.
_SCRIPTS = ("base", "state", "chart", "table", "strips", "details", "main")


def render(
    results: Sequence[TaskResults],
    first_metrics: Mapping[str, str],
    options: ReportOptions,
    missing: Sequence[str] = (),
    numbers: Mapping[tuple[str, str], TaskNumbers] | None = None,
    figures: Mapping[tuple[str, str], Mapping[str, Sequence[str]]] | None = None,
) -> str:
    """Returns the page as a text.

    Args:
        results: of all tasks.
        first_metrics: the metric that each task begins with.
        options: of the report.
        missing: names of points that are not finished.
        numbers: by backbone and task: intervals, and comparisons with the full model.
        figures: by backbone and task: the files of the plots of each metric, beside the page.
    """
    from plotly.offline import get_plotlyjs

    data = {
        "axes": AXES,
        "colours": COLOURS,
        "missing": list(missing),
        "commands": runs.commands([Path(folder).expanduser() for folder in options.folders]),
        "tasks": [
            {
                **_task(drafts.others(task), first_metrics[task.task], (numbers or {}).get((task.backbone, task.task))),
                "facts": runs.facts(task),  # of all points, those that verify too
                "drafts": drafts.table(task, options.draws, options.seed).to_dict("records"),
                "figures": {name: list(files) for name, files in (figures or {}).get(_key(task), {}).items()},
            }
            for task in results
        ],
    }
    shown = [texts.texts(drafts.others(task), first_metrics[task.task], options.samples) for task in results]
    parts = {
        "STYLE": (_ASSETS / "page.css").read_text(encoding="utf-8"),
        "PLOTLY": packed(get_plotlyjs()),
        "SCRIPT": "\n".join((_ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS),
        "TEXTS": packed(as_json(shown)),
        "DATA": packed(as_json(data)),
    }
    page = (_ASSETS / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"<!-- {name} -->", text, 1)
    return page


def packed(text: str) -> str:
    """Returns a text as base64 of gzip, which browsers unpack by themselves."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def as_json(data: Any) -> str:
    """Returns JSON as browsers read it: it has no numbers that are not finite."""
    return json.dumps(_without_nan(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _key(task: TaskResults) -> tuple[str, str]:
    return task.backbone, task.task


def _task(task: TaskResults, metric: str, numbers: TaskNumbers | None) -> dict[str, Any]:
    floors = noise.floor(task)
    of_points = None if numbers is None else numbers.points
    places = {point.name: i for i, point in enumerate(task.points)}
    series = task.series()

    def on_axes(points_of: Any) -> dict[str, Any]:
        return {
            name: {axis: [places[point.name] for point in points_of(name, axis)] for axis in AXES}
            for name in task.metrics
        }

    return {
        "title": task.title,
        "documents": len(task.full.samples),
        "depth": int(task.full.policy["num_layers"]),
        "metric": metric,
        # What the task would be opened with, were it not the same at all points.
        "usual_metric": first_metric(task),
        "flat": {name: f"{flat_line(task, name)}." for name in task.metrics if is_flat(task, name)},
        "metrics": {name: metric_name(name, task.metrics) for name in task.metrics},
        "higher_is_better": {name: task.higher_is_better(name) for name in task.metrics},
        "lines": [*series],
        "points": [_point(task, point, floors, of_points) for point in task.points],
        "labelled": [places[point.name] for point in labelled(task)],
        "fronts": on_axes(lambda name, axis: pareto_front(task, name, axis)),
        "joined": {
            line: on_axes(lambda name, axis, points=points: joined(task, points, name, axis))
            for line, points in series.items()
        },
        "ranges": {
            "y": {name: score_range(task, name) for name in task.metrics},
            "x": {axis: reduction_range(task, metric, axis, of_points) for axis in AXES},
        },
        "pairs": {} if numbers is None else {name: _by_point(table) for name, table in numbers.pairs.items()},
        "without": {} if numbers is None else {name: _by_point(table) for name, table in numbers.without.items()},
        "intervals": {} if of_points is None else _by_point(of_points),
    }


def _by_point(table: pd.DataFrame) -> dict[str, Any]:
    """Returns the rows of a table by the name of their point."""
    return {str(row["point"]): row for row in table.to_dict("records")}


def _point(
    task: TaskResults, point: PointResult, floors: Mapping[str, float], of_points: pd.DataFrame | None
) -> dict[str, Any]:
    is_compared = floors and point is not task.full
    return {
        "name": point.name,
        "family": point.kind,
        "line": point.series,
        "setting": setting(point),
        "label": setting(point, is_short=True),
        "exits": texts.exits(point),
        "valid": point.valid,
        "invalid_because": point.invalid_because,
        "only_rounding": point.only_rounding,
        "within_noise": {name: noise.within(task, floors, point, name) for name in task.metrics} if is_compared else {},
        "scores": point.scores,
        "at": {axis: task.reduction(point, axis) for axis in AXES},
        "bars": {axis: place(task, point, task.metrics[0], axis, of_points).x_bar for axis in AXES},
        "degenerate": point.compute["degenerate_rate"],
        "at_limit": point.compute["token_limit_share"],
        "tokens": point.compute["mean_generated_tokens"],
        "mean_exit_layer": point.compute["mean_exit_layer"],
        "histogram": point.compute["exit_histogram"],
        "timing": point.timing,
        "consistency": point.consistency,
        "changes": {name: texts.changes(task, point, name) for name in task.metrics},
    }


def _without_nan(data: Any) -> Any:
    """Returns data with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return data
