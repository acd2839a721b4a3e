"""What was run: the settings of a task's points as their result files say them, and the commands of their sweeps."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from dynamax_lm_eval.sweep.files import SWEEP_NAME
from dynamax_lm_eval.sweep.options import SweepOptions
from dynamax_lm_eval.sweep.results import TaskResults


def facts(task: TaskResults) -> dict[str, str]:
    """Returns what a reader must know of a task's runs to judge or repeat them, by what it is called."""
    runs = [point.run for point in task.points if point.run]

    def every(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))

    dates = sorted({datetime.fromtimestamp(run["date"], tz=UTC).strftime("%Y-%m-%d") for run in runs if "date" in run})
    found = {
        "backbone": task.backbone,
        "dtype": every(point.dtype for point in task.points),
        "device": every(run.get("device") for run in runs),
        "exits": every((run.get("exits_fingerprint") or "")[:12] for run in runs) or "none trained",
        "documents": str(len(task.full.samples)),
        "batch size": every(point.rows for point in task.points),
        "date": " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])),
        "versions": every(_versions(run) for run in runs),
    }
    return {name: value for name, value in found.items() if value}


def _versions(run: dict[str, Any]) -> str:
    versions = {"dynamax-lm-eval": run.get("version"), **(run.get("versions") or {})}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def commands(folders: Sequence[Path]) -> list[str]:
    """Returns the commands of the sweeps in or below these folders; a comment where their options cannot be read."""
    paths = sorted({path for folder in folders for path in folder.rglob(SWEEP_NAME)})
    return [_command(path) for path in paths]


def _command(path: Path) -> str:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        given = None
    if not isinstance(given, dict):
        return f"# {path.name} is damaged: the command is not known"
    words = ["dynamax-lm-eval", "sweep"]
    for option in fields(SweepOptions):
        default = None if option.default is MISSING else option.default
        value = given.get(option.name, default)
        if value == default:
            continue
        words += [f"--{option.name}"] if value is True else [f"--{option.name}", str(value)]
    return shlex.join(words)
