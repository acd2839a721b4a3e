"""Reads what sweeps wrote, and puts it side by side: one tidy table, and the documents behind it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from lm_eval.api.model import hash_args

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.sweep.files import RESPONSES_NAME, check_results, finished_points
from dynamax_lm_eval.sweep.similarity import consistency
from dynamax_lm_eval.sweep.store import stored_responses

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

#: Rows of a result that say something of compute, not of quality.
_COMPUTE = ("compute_reduction", "mean_exit_layer", "generated_tokens", "token_limit_share", "degenerate_rate")


@dataclass
class PointResult:
    """One point on one task.

    Attributes:
        scores: metric -> (value, standard error or NaN).
        higher_is_better: metric without its filter -> what the task says.
        samples: the harness's samples, in order of document.
        answers: each document's text or chosen answer.
        compute: the task's entry in ``compute.by_task``.
        pieces: each document's generated tokens as texts; None where nothing was generated.
    """

    name: str
    kind: str
    series: str
    x: float
    policy: dict[str, Any]
    scores: dict[str, tuple[float, float]]
    compute: dict[str, Any]
    samples: list[dict[str, Any]]
    answers: list[Any]
    pieces: list[list[str] | None]
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    #: Likeness to the full model's answers: name -> one number per document.
    likeness: dict[str, list[float]] = field(default_factory=dict)
    valid: bool = True

    @property
    def consistency(self) -> dict[str, float]:
        """Means of the likeness."""
        return {name: float(np.mean(values)) for name, values in self.likeness.items()}

    def macs(self, name: str) -> Floats:
        """MACs of every document (n,)."""
        return np.asarray([sample["macs"][name] for sample in self.samples], dtype=np.float64)

    def per_document(self, metric: str) -> Floats | None:
        """The metric of every document (n,), where the task's value is their mean."""
        name = metric.partition(",")[0]
        if metric in self.likeness:
            return np.asarray(self.likeness[metric])
        values = [sample.get(name) for sample in self.samples]
        if not all(isinstance(value, (int, float)) for value in values):
            return None
        found = np.asarray(values, dtype=np.float64)
        return found if abs(found.mean() - self.scores[metric][0]) < 1e-6 else None


@dataclass
class TaskResults:
    """All points of one backbone on one task, the full model first."""

    backbone: str
    task: str
    points: list[PointResult]

    @property
    def full(self) -> PointResult:
        return self.points[0]

    @property
    def title(self) -> str:
        return f"{self.backbone}: {self.task}"

    @property
    def metrics(self) -> list[str]:
        """The task's own metrics, then the likeness to the full model's answers."""
        return list(self.full.scores)

    def higher_is_better(self, metric: str) -> bool:
        """As the task says; true where it says nothing."""
        return self.full.higher_is_better.get(metric.partition(",")[0], True)

    def lines(self) -> dict[str, list[PointResult]]:
        """Points by line, in order of their value."""
        found: dict[str, list[PointResult]] = {}
        for point in self.points[1:]:
            found.setdefault(point.series, []).append(point)
        return {name: sorted(points, key=lambda point: point.x) for name, points in found.items()}

    def valid_lines(self) -> dict[str, list[PointResult]]:
        """Lines without their invalid points; those that have no others are left out."""
        lines = {name: [point for point in points if point.valid] for name, points in self.lines().items()}
        return {name: points for name, points in lines.items() if points}

    def reduction(self, point: PointResult, axis: str) -> float:
        """Where a point lies on a compute axis (one of ``statistics.AXES``)."""
        return self.vs_full(point) if axis == "compute_vs_full" else float(point.compute["compute_reduction"])

    def vs_full(self, point: PointResult) -> float:
        """MACs of the full model's run over those of this one, prompts included."""
        return float(self.full.macs("total").sum() / point.macs("total").sum())


def read(folders: Sequence[Path], max_degenerate: float) -> list[TaskResults]:
    """All tasks of all sweeps in these folders.

    Args:
        folders: of sweeps, or above some.
        max_degenerate: a point is invalid where its degenerate_rate is more than this above the full model's.

    Raises:
        UserError: there is no finished point, or no full model to compare with, or a file is damaged.
    """
    groups: dict[tuple[str, str], list[PointResult]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        points = finished_points(folder)
        if not points:
            raise UserError(f"{folder} holds no finished point of a sweep; run dynamax-lm-eval sweep --output {folder}")
        for point in points:
            for backbone, task, result in _results(point):
                groups.setdefault((backbone, task), []).append(result)
    found = []
    for (backbone, task), results in sorted(groups.items()):
        full = [result for result in results if result.kind == "full"]
        if not full:
            raise UserError(f"{backbone}, {task}: the full model is missing; let the sweep finish")
        others = [result for result in results if result.kind != "full"]
        documents = [sample["doc_id"] for sample in full[0].samples]
        kept = [point for point in others if [sample["doc_id"] for sample in point.samples] == documents]
        if len(kept) < len(others):
            logger.warning(
                "%s, %s: %d points answered other documents than the full model and are left out",
                backbone,
                task,
                len(others) - len(kept),
            )
        _compare(full[0], kept, max_degenerate)
        found.append(TaskResults(backbone, task, [full[0], *kept]))
    return found


def tidy(results: Sequence[TaskResults]) -> pd.DataFrame:
    """One row per point, task and metric."""
    rows = []
    for task in results:
        for point in task.points:
            common = {
                "backbone": task.backbone,
                "task": task.task,
                "point": point.name,
                "family": point.kind,
                "line": point.series,
                "value": point.x,
                "state_mode": point.policy["state_mode"] if point.kind == "exits" else None,
                "documents": len(point.samples),
                "valid": point.valid,
            }
            compute = {
                **{name: point.compute[name] for name in ("compute_reduction", "compute_reduction_stderr")},
                "compute_vs_full": task.vs_full(point),
                "compute_reduction_total": point.compute["compute_reduction_total"],
                "compute_reduction_paper": point.compute["compute_reduction_paper"],
                "mean_exit_layer": point.compute["mean_exit_layer"],
                "generated_tokens": point.compute["mean_generated_tokens"],
                "degenerate_rate": point.compute["degenerate_rate"],
                **point.consistency,
            }
            for metric, (value, stderr) in point.scores.items():
                if metric in point.likeness:
                    continue  # it has columns of its own
                name, _, harness_filter = metric.partition(",")
                score = {"metric": name, "filter": harness_filter, "score": value, "score_stderr": stderr}
                rows.append({**common, **score, **compute})
    return pd.DataFrame(rows)


def _results(point: dict[str, Any]) -> list[tuple[str, str, PointResult]]:
    folder: Path = point["folder"]
    check_results(folder, point["checksums"])
    data = json.loads((folder / point["results"]).read_text(encoding="utf-8"))
    pieces = _pieces(folder / RESPONSES_NAME, point["answers"])
    found = []
    for task, file in point["samples"].items():
        samples = _json_lines(folder / file)
        first_filter = samples[0]["filter"]
        samples = sorted(
            (sample for sample in samples if sample["filter"] == first_filter), key=lambda sample: sample["doc_id"]
        )
        result = PointResult(
            name=point["point"],
            kind=point["family"],
            series=point["line"],
            x=point["value"],
            policy=point["policy"],
            scores=_scores(data["results"][task]),
            compute=data["compute"]["by_task"][task],
            samples=samples,
            answers=[_answer(sample) for sample in samples],
            pieces=[pieces.get(_key(sample)) for sample in samples],
            higher_is_better=data.get("higher_is_better", {}).get(task) or {},
        )
        found.append((str(data["config"]["model_name"]), task, result))
    return found


def _scores(metrics: dict[str, Any]) -> dict[str, tuple[float, float]]:
    scores = {}
    for key, value in metrics.items():
        name, comma, harness_filter = key.partition(",")
        if not comma or not isinstance(value, (int, float)) or name.endswith("_stderr") or name.startswith(_COMPUTE):
            continue
        stderr = metrics.get(f"{name}_stderr,{harness_filter}")
        scores[key] = (float(value), float(stderr) if isinstance(stderr, (int, float)) else float("nan"))
    return scores


def _answer(sample: dict[str, Any]) -> Any:
    """A document's first text, or which of its continuations is the most probable; None for whole texts."""
    responses = [response[0] for response in sample["resps"]]
    if isinstance(responses[0], list):  # (log-likelihood, is_greedy) of each continuation
        return int(np.argmax([float(response[0]) for response in responses]))
    generated = isinstance(sample["arguments"]["gen_args_0"].get("arg_1"), dict)
    return responses[0] if generated else None


def _key(sample: dict[str, Any]) -> str:
    arguments = sample["arguments"]["gen_args_0"]
    return str(hash_args("generate_until", [arguments[f"arg_{i}"] for i in range(len(arguments))]))


def _pieces(path: Path, count: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, response in stored_responses(path, count).items():
        if response.pieces is not None:
            found.setdefault(key.partition(":")[0], response.pieces)
    return found


def _json_lines(path: Path) -> list[dict[str, Any]]:
    # str.splitlines also breaks at separators that texts may hold, U+2028 among them.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _compare(full: PointResult, others: Sequence[PointResult], max_degenerate: float) -> None:
    usual = full.compute.get("degenerate_rate") or 0.0
    for point in (full, *others):
        found = consistency(full.answers, point.answers)
        point.likeness = {f"consistency_{name}": values for name, values in found.items()}
        for name, values in point.likeness.items():
            spread = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
            point.scores[name] = (float(np.mean(values)), spread)
        point.valid = (point.compute.get("degenerate_rate") or 0.0) <= usual + max_degenerate
