"""Reads what sweeps wrote, and puts it side by side: one tidy table, and the documents behind it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.harness.ledger import RequestKey, request_keys
from dynamax_lm_eval.sweep.baselines import STATIC
from dynamax_lm_eval.sweep.files import RESPONSES_NAME, check_results, finished_points, json_lines
from dynamax_lm_eval.sweep.noise import NOISE
from dynamax_lm_eval.sweep.options import VERIFIED
from dynamax_lm_eval.sweep.similarity import consistency
from dynamax_lm_eval.sweep.store import Response, stored_responses

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

Booleans = npt.NDArray[np.bool_]

#: Rows of a result that say something of compute, not of quality.
_COMPUTE = (
    "compute_reduction",
    "compute_vs_full",
    "mean_exit_layer",
    "generated_tokens",
    "token_limit_share",
    "degenerate_rate",
)
#: Parts of ``compute.overall.latency``.
_LATENCIES = ("time_to_first_token_ms", "time_per_output_token_ms")


@dataclass
class PointResult:
    """The results of one point on one task.

    Attributes:
        scores: metric -> (value, standard error or NaN).
        higher_is_better: metric without its filter -> what the task says.
        dtype: in which the backbone computed, as torch writes it; empty where files of earlier releases do not say.
        rows: in flight; None where they do not say.
        samples: the harness's samples, in order of document.
        answers: of each document: a text, or the index of the most probable continuation.
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
    dtype: str = ""
    rows: int | None = None
    #: Similarity to the full model's answers: name -> one number per document.
    similarity: dict[str, list[float]] = field(default_factory=dict)
    valid: bool = True
    #: Why it is not valid; empty where it is.
    invalid_because: str = ""
    #: What the result file says of the run: versions, date, exits, device; empty where points were made by hand.
    run: dict[str, Any] = field(default_factory=dict)
    #: Latency and energy of this point alone, where the result file has them; answers of a whole grid share theirs.
    timing: dict[str, Any] = field(default_factory=dict)
    #: No token left early and no block was pruned, and still some answers are not the full model's: what other rows in
    #: a batch do to rounding.
    only_rounding: bool = False
    #: Of each document, whether a text ended at the token limit or in repetition; empty: none did.
    looping: list[bool] = field(default_factory=list)

    @property
    def consistency(self) -> dict[str, float]:
        """The mean similarity to the full model's answers, by its name."""
        return {name: float(np.mean(values)) for name, values in self.similarity.items()}

    def macs(self, name: str) -> Floats:
        """Returns the MACs of all documents, (n,)."""
        return np.asarray([sample["macs"][name] for sample in self.samples], dtype=np.float64)

    def per_document(self, metric: str) -> Floats | None:
        """Returns the metric of all documents, (n,), where the task's value is their mean; else None."""
        name = metric.partition(",")[0]
        if metric in self.similarity:
            return np.asarray(self.similarity[metric])
        values = [sample.get(name) for sample in self.samples]
        if not all(isinstance(value, (int, float)) for value in values):
            return None
        numbers = np.asarray(values, dtype=np.float64)
        return numbers if abs(numbers.mean() - self.scores[metric][0]) < 1e-6 else None


@dataclass
class TaskResults:
    """The results of all points of one backbone on one task, the full model first."""

    backbone: str
    task: str
    points: list[PointResult]
    #: The full model once more, with other numbers of rows in flight; not among the points.
    again: list[PointResult] = field(default_factory=list)

    @property
    def full(self) -> PointResult:
        return self.points[0]

    @property
    def title(self) -> str:
        return f"{self.backbone}: {self.task}"

    @property
    def metrics(self) -> list[str]:
        """The task's own metrics, then the similarity to the full model's answers."""
        return list(self.full.scores)

    def higher_is_better(self, metric: str) -> bool:
        """Says whether more is better, as the task does; true where it says nothing."""
        return self.full.higher_is_better.get(metric.partition(",")[0], True)

    def series(self) -> dict[str, list[PointResult]]:
        """Returns the points of each series, in order of ``x``; those that verify save nothing and are in none."""
        series: dict[str, list[PointResult]] = {}
        for point in self.points[1:]:
            if point.kind != VERIFIED:
                series.setdefault(point.series, []).append(point)
        return {name: sorted(points, key=lambda point: point.x) for name, points in series.items()}

    def valid_series(self) -> dict[str, list[PointResult]]:
        """Returns the series without their invalid points; those that have no others are left out."""
        series = {name: [point for point in points if point.valid] for name, points in self.series().items()}
        return {name: points for name, points in series.items() if points}

    def reduction(self, point: PointResult, axis: str) -> float:
        """Returns where a point lies on a compute axis (one of ``statistics.AXES``)."""
        return self.vs_full(point) if axis == "compute_vs_full" else float(point.compute["compute_reduction"])

    def vs_full(self, point: PointResult) -> float:
        """Returns the MACs of the full model's run over those of this one, prompts included."""
        return float(self.full.macs("total").sum() / point.macs("total").sum())

    def loops(self, point: PointResult) -> Booleans:
        """Returns of each document (n,) whether its text ended at the token limit or in repetition, in either run.

        Such texts hold most tokens, so they decide what a ratio of sums is. Where one run alone decided who is left
        out, loops that the other run has would stay.
        """
        either = np.zeros(len(point.samples), dtype=np.bool_)
        for run in (self.full, point):
            if run.looping:
                either |= np.asarray(run.looping)
        return either


def read(
    folders: Sequence[Path], max_degenerate: float, max_token_limit: Callable[[str], float] = lambda _: 1.0
) -> list[TaskResults]:
    """Reads all tasks of all sweeps in these folders.

    Args:
        folders: of sweeps, or above some.
        max_degenerate: a point is invalid where its degenerate_rate is more than this above the full model's.
        max_token_limit: gives for a task the token_limit_share above which a point is invalid, whatever the full
            model's is.

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
    tasks = []
    for (backbone, task), results in sorted(groups.items()):
        full = [result for result in results if result.kind == "full"]
        if not full:
            raise UserError(f"{backbone}, {task}: the full model is missing; let the sweep finish")
        others = [result for result in results if result.kind != "full"]
        documents = _documents(full[0])
        kept = [point for point in others if _documents(point) == documents]
        if len(kept) < len(others):
            logger.warning(
                "%s, %s: %d points answered other documents than the full model and are left out",
                backbone,
                task,
                len(others) - len(kept),
            )
        _compare(full[0], kept, max_degenerate, max_token_limit(task))
        again = [point for point in kept if point.kind == NOISE]
        tasks.append(TaskResults(backbone, task, [full[0], *(point for point in kept if point.kind != NOISE)], again))
    return tasks


def _documents(point: PointResult) -> list[tuple[int, str]]:
    """Returns which documents a point answered: an id alone says nothing where the data of a task changed."""
    return [(sample["doc_id"], sample["doc_hash"]) for sample in point.samples]


def tidy(results: Sequence[TaskResults]) -> pd.DataFrame:
    """Returns a table with one row per point, task and metric."""
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
                "state_mode": point.policy["state_mode"] if point.kind in ("exits", STATIC) else None,
                **_run_columns(point),
                "documents": len(point.samples),
                "valid": point.valid,
                "only_rounding": point.only_rounding,
            }
            compute = {
                **{name: point.compute[name] for name in ("compute_reduction", "compute_reduction_stderr")},
                "compute_vs_full": task.vs_full(point),
                "compute_reduction_total": point.compute["compute_reduction_total"],
                "compute_reduction_paper": point.compute["compute_reduction_paper"],
                "mean_exit_layer": point.compute["mean_exit_layer"],
                "generated_tokens": point.compute["mean_generated_tokens"],
                "token_limit_share": point.compute["token_limit_share"],
                "degenerate_rate": point.compute["degenerate_rate"],
                **point.consistency,
                **point.timing,
            }
            for metric, (value, stderr) in point.scores.items():
                if metric in point.similarity:
                    continue  # it has columns of its own
                name, _, harness_filter = metric.partition(",")
                score = {"metric": name, "filter": harness_filter, "score": value, "score_stderr": stderr}
                rows.append({**common, **score, **compute})
    return pd.DataFrame(rows)


def _run_columns(point: PointResult) -> dict[str, Any]:
    """Returns what a row must say of its run to be compared with others; None where a point has no such thing."""
    has_exits = point.kind in ("exits", STATIC, VERIFIED)
    date = point.run.get("date")
    return {
        "exit_layers": "+".join(map(str, point.policy["exit_layers"])) if has_exits else None,
        "dtype": point.dtype or None,
        "device": point.run.get("device"),
        "exits_fingerprint": (point.run.get("exits_fingerprint") or "")[:12] or None if has_exits else None,
        "date": None if date is None else datetime.fromtimestamp(date, tz=UTC).isoformat(timespec="seconds"),
    }


def _results(point: dict[str, Any]) -> list[tuple[str, str, PointResult]]:
    """Reads the results of a finished point as (backbone, task, result)."""
    folder: Path = point["folder"]
    check_results(folder, point["checksums"])
    data = json.loads((folder / point["results"]).read_text(encoding="utf-8"))
    responses = stored_responses(folder / RESPONSES_NAME, point["answers"])
    pieces, looping = _pieces(responses), _looping(responses)
    results = []
    for task, file in point["samples"].items():
        samples = json_lines(folder / file)
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
            pieces=[pieces.get(_digest(sample)) for sample in samples],
            higher_is_better=data.get("higher_is_better", {}).get(task) or {},
            dtype=str(data["config"]["dynamax"].get("dtype", "")).removeprefix("torch."),
            rows=data["config"]["dynamax"].get("batch_size"),
            run={**data["config"]["dynamax"], **{name: data[name] for name in ("date",) if name in data}},
            timing=_timing(data["compute"].get("overall", {}), task, len(point["samples"]) == 1),
            looping=[_digest(sample) in looping for sample in samples],
        )
        results.append((_backbone(data["config"]), task, result))
    return results


def _backbone(config: dict[str, Any]) -> str:
    """Returns the backbone of a result: files of earlier releases say it in place of the operating point's name."""
    return str(config["dynamax"].get("backbone_name") or config["model_name"])


def _timing(overall: Mapping[str, Any], task: str, is_alone: bool) -> dict[str, Any]:
    """Returns mean latencies of a task in milliseconds, joules per token, and seconds, as far as they were measured.

    Seconds are of all tasks of a run, so they are a task's where it ``is_alone``.
    """
    of_task = ((overall.get("latency") or {}).get("by_task") or {}).get(task) or {}
    found = {name: (of_task.get(name) or {}).get("mean") for name in _LATENCIES}
    found["seconds"] = overall.get("seconds_total") if is_alone else None
    found["joules_per_token"] = (overall.get("energy") or {}).get("per_generated_token")
    return {name: value for name, value in found.items() if value is not None}


def _scores(metrics: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Returns the scores of a task, without its compute, each with its standard error or NaN."""
    scores = {}
    for key, value in metrics.items():
        name, comma, harness_filter = key.partition(",")
        if not comma or not isinstance(value, (int, float)) or name.endswith("_stderr") or name.startswith(_COMPUTE):
            continue
        stderr = metrics.get(f"{name}_stderr,{harness_filter}")
        scores[key] = (float(value), float(stderr) if isinstance(stderr, (int, float)) else float("nan"))
    return scores


def _answer(sample: dict[str, Any]) -> Any:
    """Returns a document's first text, or which of its continuations is the most probable; None for whole texts."""
    responses = [response[0] for response in sample["resps"]]
    if isinstance(responses[0], list):  # (log-likelihood, is_greedy) of each continuation
        return int(np.argmax([float(response[0]) for response in responses]))
    generated = isinstance(sample["arguments"]["gen_args_0"].get("arg_1"), dict)
    return responses[0] if generated else None


def _digest(sample: dict[str, Any]) -> str:
    """Returns the digest of the request that a sample of a generation answers."""
    arguments = sample["arguments"]["gen_args_0"]
    (key,) = request_keys([("generate_until", [arguments[f"arg_{i}"] for i in range(len(arguments))])])
    return key.digest


def _pieces(responses: Mapping[str, Response]) -> dict[str, list[str]]:
    """Returns the token texts of a point's generations, by the digests of their requests."""
    pieces: dict[str, list[str]] = {}
    for key, response in responses.items():
        if response.pieces is not None:
            pieces.setdefault(RequestKey.digest_in(key), response.pieces)
    return pieces


def _looping(responses: Mapping[str, Response]) -> set[str]:
    """Returns the digests of the requests of which some text ended at the token limit or in repetition."""
    return {
        RequestKey.digest_in(key)
        for key, response in responses.items()
        if response.record.hit_limit or response.record.degenerate
    }


def _is_full_depth(point: PointResult) -> bool:
    """Returns whether every eligible token of a point ran all blocks."""
    depth = str(point.policy.get("num_layers"))
    return point.kind == "exits" and set(point.compute.get("exit_histogram", {})) <= {depth}


def _compare(full: PointResult, others: Sequence[PointResult], max_degenerate: float, max_token_limit: float) -> None:
    """Puts into points their similarity to the full model's answers, and whether they are valid."""
    usual = full.compute.get("degenerate_rate") or 0.0
    for point in (full, *others):
        similarity = consistency(full.answers, point.answers)
        point.similarity = {f"consistency_{name}": values for name, values in similarity.items()}
        for name, values in point.similarity.items():
            spread = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
            point.scores[name] = (float(np.mean(values)), spread)
        point.only_rounding = _is_full_depth(point) and any(min(values) < 1 for values in similarity.values())
        reasons = []
        repeating, at_limit = (point.compute.get(name) or 0.0 for name in ("degenerate_rate", "token_limit_share"))
        if repeating > usual + max_degenerate:
            reasons.append(
                f"{repeating:.0%} of its texts repeat themselves, more than {max_degenerate:.0%} above the full "
                f"model's {usual:.0%}"
            )
        if point is not full and at_limit > max_token_limit:
            reasons.append(f"{at_limit:.0%} of its texts end at the token limit, more than {max_token_limit:.0%}")
        point.invalid_because = "; ".join(reasons)
        point.valid = not reasons
