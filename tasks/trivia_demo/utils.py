"""Data loading for the ``trivia_demo`` task.

The questions are two JSON Lines files next to this module, so the task works
offline, from any working directory and from an installed package.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import datasets

_FOLDER = Path(__file__).resolve().parent
_SPEC = importlib.util.spec_from_file_location("_local_data", _FOLDER.parent / "_local_data.py")
assert _SPEC and _SPEC.loader
local_data = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(local_data)

_COLUMNS = {"question_id": str, "question": str, "answer": str, "aliases": list}
_FILES = {"test": "questions.jsonl", "fewshot": "fewshot.jsonl"}


def _read(path: Path) -> datasets.Dataset:
    """Read one JSON Lines file into a data set."""
    return datasets.Dataset.from_list(local_data.read_jsonl(path, _COLUMNS))


def load(**kwargs: Any) -> dict[str, datasets.Dataset]:
    """Return the ``test`` and ``fewshot`` splits.

    The harness passes the run's model arguments and the task's metadata as
    keyword arguments; this task needs none of them.
    """
    return {split: _read(_FOLDER / name) for split, name in _FILES.items()}
