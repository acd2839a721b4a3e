"""One HTML page that needs nothing else: curves, the points behind them, and texts with their exit layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dynamax_lm_eval.reports import noise
from dynamax_lm_eval.reports.plots import COLOURS, coordinates
from dynamax_lm_eval.reports.statistics import AXES, front
from dynamax_lm_eval.reports.tables import TaskNumbers
from dynamax_lm_eval.sweep.results import PointResult, TaskResults

_ASSETS = Path(__file__).parent / "assets"
#: Characters of a prompt's end that are shown.
_PROMPT_SHOWN = 300


def render(
    results: Sequence[TaskResults],
    first_metrics: Mapping[str, str],
    samples: int,
    missing: Sequence[str] = (),
    numbers: Mapping[tuple[str, str], TaskNumbers] | None = None,
) -> str:
    """Returns the page as a text.

    Args:
        results: of all tasks.
        first_metrics: the metric that each task begins with.
        samples: documents shown per point.
        missing: names of points that are not finished.
        numbers: by backbone and task: intervals, and comparisons with the full model.
    """
    from plotly.offline import get_plotlyjs

    data = {
        "axes": AXES,
        "colours": COLOURS,
        "missing": list(missing),
        "tasks": [
            _task(task, first_metrics[task.task], samples, (numbers or {}).get((task.backbone, task.task)))
            for task in results
        ],
    }
    parts = {
        "STYLE": (_ASSETS / "page.css").read_text(encoding="utf-8"),
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": (_ASSETS / "page.js").read_text(encoding="utf-8"),
        "DATA": as_script(data),
    }
    page = (_ASSETS / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"<!-- {name} -->", text, 1)
    return page


def as_script(data: Any) -> str:
    """Returns JSON that may stand inside a script element, whatever texts it holds."""
    text = json.dumps(_without_nan(data), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def differing_samples(full: PointResult, point: PointResult, count: int) -> list[dict[str, Any]]:
    """Returns the first documents whose answers are not the full model's."""
    differing: list[dict[str, Any]] = []
    for i, (theirs, ours) in enumerate(zip(full.answers, point.answers, strict=True)):
        if theirs != ours and len(differing) < count:
            sample = point.samples[i]
            prompt = str(sample["arguments"]["gen_args_0"]["arg_0"])
            differing.append(
                {
                    "document": sample["doc_id"],
                    "prompt": ("… " if len(prompt) > _PROMPT_SHOWN else "") + prompt[-_PROMPT_SHOWN:],
                    "full": str(theirs),
                    "ours": str(ours),
                    "target": str(sample["target"])[:_PROMPT_SHOWN],
                    "tokens": strip(point, i),
                }
            )
    return differing


def strip(point: PointResult, document: int) -> list[tuple[str, int]] | None:
    """Returns each generated token of a document with the number of blocks that gave it; None where none was generated.

    The first one comes from the prompt's last token: at full depth, unless prompts may exit.
    """
    pieces = point.pieces[document]
    if pieces is None:
        return None
    depth = int(point.policy["num_layers"])
    layers = [layer for response in point.samples[document]["exit_layers"][:1] for layer in response]
    by_token = ([depth, *layers] if point.policy["exit_scope"] == "generated" else layers)[-len(pieces) :]
    by_token = [depth] * (len(pieces) - len(by_token)) + by_token
    return list(zip(pieces, by_token, strict=True))


def _task(task: TaskResults, metric: str, samples: int, numbers: TaskNumbers | None) -> dict[str, Any]:
    floors = noise.floor(task)
    return {
        "title": task.title,
        "documents": len(task.full.samples),
        "depth": int(task.full.policy["num_layers"]),
        "metric": metric,
        "metrics": {name: name.partition(",")[0] for name in task.metrics},
        "higher_is_better": {name: task.higher_is_better(name) for name in task.metrics},
        "lines": [*task.series()],
        "points": [_point(task, point, samples, floors) for point in task.points],
        "fronts": {name: {axis: _front(task, name, axis) for axis in AXES} for name in task.metrics},
        "pairs": {} if numbers is None else {name: _by_point(table) for name, table in numbers.pairs.items()},
        "without": {} if numbers is None else {name: _by_point(table) for name, table in numbers.without.items()},
        "intervals": {} if numbers is None else _by_point(numbers.points),
    }


def _by_point(table: pd.DataFrame) -> dict[str, Any]:
    """Returns the rows of a table by the name of their point."""
    return {str(row["point"]): row for row in table.to_dict("records")}


def _point(task: TaskResults, point: PointResult, samples: int, floors: Mapping[str, float]) -> dict[str, Any]:
    is_compared = floors and point is not task.full
    return {
        "name": point.name,
        "family": point.kind,
        "line": point.series,
        "value": point.x,
        "valid": point.valid,
        "only_rounding": point.only_rounding,
        "within_noise": {name: noise.within(task, floors, point, name) for name in task.metrics} if is_compared else {},
        "scores": point.scores,
        "at": {axis: task.reduction(point, axis) for axis in AXES},
        "degenerate": point.compute["degenerate_rate"],
        "tokens": point.compute["mean_generated_tokens"],
        "mean_exit_layer": point.compute["mean_exit_layer"],
        "consistency": point.consistency,
        "samples": differing_samples(task.full, point, samples),
    }


def _front(task: TaskResults, metric: str, axis: str) -> list[int]:
    """Returns the places of the points that no other surpasses, among all points."""
    shown = [i for i, point in enumerate(task.points) if point.valid]
    places = [coordinates(task, task.points[i], metric, axis)[:2] for i in shown]
    return [shown[i] for i in front(places, task.higher_is_better(metric))]


def _without_nan(data: Any) -> Any:
    """Returns data with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return data
