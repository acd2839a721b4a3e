"""Data of the ``triviaqa_thesis`` task: the TriviaQA questions with the longest first aliases, ranks 1000 to 1999."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import datasets

_LONG = Path(__file__).resolve().parent.parent / "triviaqa_long" / "utils.py"
_SPEC = importlib.util.spec_from_file_location("_triviaqa_long", _LONG)
assert _SPEC and _SPEC.loader
triviaqa_long = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(triviaqa_long)

TASK = "triviaqa_thesis"
#: Ranks of the evaluated questions, from 0.
FIRST, LAST = 1000, 2000


def load(data_dir: Any = None, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Return the splits ``validation`` and ``train`` (where examples are drawn).

    Args:
        data_dir: folder of a local file; without it the data come from the Hub.
        kwargs: the run's other model arguments and metadata, which this task does not need.
    """
    return dict(_load(triviaqa_long.local_data.find(TASK, triviaqa_long.PATTERN, data_dir)))


@functools.cache
def _load(file: Any) -> dict[str, datasets.Dataset]:
    """Select once per process: the harness asks several times."""
    if file is None:
        hub = datasets.load_dataset(*triviaqa_long.HUB)
        validation, train = (
            [_hub_row(row) for row in hub[split].select_columns(["question_id", "question", "answer"])]
            for split in triviaqa_long.HUB_SPLITS
        )
        evaluated, _ = _ranked(validation)
    else:
        # A local file has one split, and no order of aliases: the shortest stands for the first, as in triviaqa_long.
        rows = triviaqa_long.local_rows(file.path)
        evaluated, train = _ranked(rows)
        if len(evaluated) < LAST - FIRST or not train:
            raise ValueError(f"{file.path}: {len(rows)} questions are too few; {TASK} needs more than {LAST}")
    made = {"validation": evaluated, "train": train}
    return {name: datasets.Dataset.from_list(rows, features=triviaqa_long.COLUMNS) for name, rows in made.items()}


def _hub_row(row: dict[str, Any]) -> dict[str, Any]:
    aliases = row["answer"]["aliases"]
    return {
        "question_id": row["question_id"],
        "question": row["question"],
        "answer": aliases[0] if aliases else row["answer"]["value"],
        "aliases": aliases or [row["answer"]["value"]],
    }


def _ranked(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split rows into the evaluated ones, in the order of ids, and those behind them.

    Most characters of the first alias first, then the smallest id; a question that is listed twice counts once.
    """
    unique: dict[str, dict[str, Any]] = {}
    for row in rows:
        unique.setdefault(row["question_id"], row)
    ranked = sorted(unique.values(), key=lambda row: (-len(row["answer"]), row["question_id"]))
    return sorted(ranked[FIRST:LAST], key=lambda row: row["question_id"]), ranked[LAST:]
