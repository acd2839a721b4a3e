"""Data loading for the ``trivia_demo`` task.

The questions are two JSON Lines files next to this module, so the task works
offline, from any working directory and from an installed package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

_FOLDER = Path(__file__).resolve().parent
_FILES = {"test": "questions.jsonl", "fewshot": "fewshot.jsonl"}


def _read(path: Path) -> datasets.Dataset:
    """Read one JSON Lines file into a data set."""
    with path.open(encoding="utf-8") as lines:
        return datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])


def load(**kwargs: Any) -> dict[str, datasets.Dataset]:
    """Return the ``test`` and ``fewshot`` splits.

    The harness passes the run's model arguments and the task's metadata as
    keyword arguments; this task needs none of them.
    """
    return {split: _read(_FOLDER / name) for split, name in _FILES.items()}
