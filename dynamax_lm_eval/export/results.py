"""Reads the result files below a folder, of runs and of sweeps, as one row per operating point, task and metric."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dynamax_lm_eval.errors import UserError
from dynamax_lm_eval.sweep.noise import NOISE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResultFile:
    """A ``results_*.json`` of ours."""

    path: Path
    data: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The section ``config.dynamax``."""
        settings: dict[str, Any] = self.data["config"]["dynamax"]
        return settings

    @property
    def name(self) -> str:
        """Of the operating point."""
        return str(self.data["config"]["model_name"])

    @property
    def date(self) -> str:
        """When it was evaluated, ISO 8601."""
        return datetime.fromtimestamp(float(self.data["date"]), UTC).isoformat(timespec="seconds")

    @property
    def dtype(self) -> str | None:
        """In which the backbone computed."""
        dtype = self.settings.get("dtype")
        return None if dtype is None else str(dtype).removeprefix("torch.")

    @property
    def documents(self) -> int:
        """How many were answered, of all tasks."""
        return sum(found.get("documents") or 0 for found in self.data["compute"]["by_task"].values())

    @property
    def rank(self) -> tuple[int, float]:
        """The larger, the rather it stands for its operating point."""
        return self.documents, float(self.data["date"])

    def documents_of(self, task: str) -> int | None:
        """Returns how many documents a task has, whatever was asked; None of a group."""
        count: int | None = self.data.get("n-samples", {}).get(task, {}).get("original")
        return count

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields a row for each metric of each task and group."""
        for task, metrics in self.data["results"].items():
            compute = self.data["compute"]["by_task"].get(task, {})
            for key, value in metrics.items():
                metric, comma, harness_filter = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                    continue
                stderr = metrics.get(f"{metric}_stderr,{harness_filter}")
                yield {
                    "model_name": self.name,
                    "backbone": self.settings["backbone_name"],
                    "label": self.settings["label"],
                    "task": task,
                    "metric": metric,
                    "filter": harness_filter,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                    "higher_is_better": self.data.get("higher_is_better", {}).get(task, {}).get(metric),
                    "documents": compute.get("documents"),
                    "documents_of_task": self.documents_of(task),
                    "n_shot": self.data.get("n-shot", {}).get(task),
                    "dtype": self.dtype,
                    "exits_fingerprint": (self.settings.get("exits_fingerprint") or "")[:12] or None,
                    "compute_reduction": compute.get("compute_reduction"),
                    "compute_reduction_total": compute.get("compute_reduction_total"),
                    "mean_exit_layer": compute.get("mean_exit_layer"),
                    "date": self.date,
                    "file": self.path.name,
                }


def read(folder: Path) -> list[ResultFile]:
    """Returns the result files below a folder.

    Of several of one operating point, dtype and set of tasks it is the one with the most documents, and of those the
    newest: a later try with a few documents does not stand for the whole. Those left out are named.

    Raises:
        UserError: there is none of ours, or one cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    kept: dict[tuple[str, str | None, tuple[str, ...]], ResultFile] = {}
    for path in sorted(folder.rglob("results_*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if "backbone_name" not in data.get("config", {}).get("dynamax", {}):
            continue  # of another model, or of a release that gave no names
        if data["config"]["dynamax"].get("sweep", {}).get("family") == NOISE:
            continue  # the full model again, which says what is rounding and is no operating point
        found = ResultFile(path, data)
        key = found.name, found.dtype, tuple(sorted(data["results"]))
        if (other := kept.setdefault(key, found)) is not found:
            kept[key], left = (found, other) if found.rank >= other.rank else (other, found)
            logger.warning(
                "%s is left out: %s is of the same operating point and tasks, with %d documents (here %d)",
                left.path,
                kept[key].path.name,
                kept[key].documents,
                left.documents,
            )
    if not kept:
        raise UserError(
            f"{folder} holds no results_*.json of --model dynamax with names of operating points; evaluate with "
            "--output_path, or sweep"
        )
    return list(kept.values())
